# SPDX-License-Identifier: Apache-2.0
# What any build folder has compiled already is taken from ccache where it is installed: the presets
# `release`, `bench` and `cuda` compile the same library. CCACHE_DISABLE=1 in the environment compiles
# anew; a launcher of your own is kept.
if(PROJECT_IS_TOP_LEVEL)
  find_program(MISA_CCACHE ccache)
  mark_as_advanced(MISA_CCACHE)
  foreach(language CXX CUDA)
    if(MISA_CCACHE AND NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER ${MISA_CCACHE})
    endif()
  endforeach()
endif()

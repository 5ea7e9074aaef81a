# SPDX-License-Identifier: Apache-2.0
# What any build folder of any clone has compiled already is taken from ccache where it is installed:
# the presets `release`, `bench` and `cuda` compile the same library. CCACHE_DISABLE=1 in the
# environment compiles anew; a launcher of your own is kept.
if(PROJECT_IS_TOP_LEVEL)
  find_program(MISA_CCACHE ccache)
  mark_as_advanced(MISA_CCACHE)
  foreach(language CXX CUDA)
    if(MISA_CCACHE AND NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      # Paths inside the clone are relative to it, in debug information too.
      set(CMAKE_${language}_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
        CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${MISA_CCACHE})
    endif()
  endforeach()
endif()

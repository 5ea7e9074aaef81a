# SPDX-License-Identifier: Apache-2.0
# The CUDA backends: built by default where this project is the top level and there is nvcc.
set(MISA_HAVE_NVCC OFF)
if(PROJECT_IS_TOP_LEVEL AND NOT MISA_SANITIZE)  # the sanitizers' runtimes and CUDA's do not mix
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(MISA_HAVE_NVCC ON)
  endif()
endif()
option(MISA_BUILD_CUDA "Build the CUDA backends (needs nvcc)" ${MISA_HAVE_NVCC})

if(MISA_BUILD_CUDA)
  # Machine code for A100 (and 8.6, 8.7), L40, H100 and H200, RTX 50. For 10.x and 11.0 there is PTX
  # of 9.0, and for devices above 12.0 PTX of 12.0, which the driver compiles once. So every device
  # from 8.0 on is supported; `misa info` says which devices a list of your own supports.
  set(MISA_DEFAULT_CUDA_ARCHITECTURES 80-real 89-real 90 120)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${MISA_DEFAULT_CUDA_ARCHITECTURES})
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_ARCHITECTURES MATCHES "^(native|all|all-major)$")  # the library needs the list
    string(TOUPPER "${CMAKE_CUDA_ARCHITECTURES}" list)
    string(REPLACE "-" "_" list "${list}")
    set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_${list}})
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "^[0-9]")
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES: expected a list such as 90;120, got "
      "'${CMAKE_CUDA_ARCHITECTURES}'")
  endif()
  set(MISA_CUDA_SM90_ARCHITECTURES 90a-real)  # only Hopper has this wgmma
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)
endif()

# Compiles the kernels of these sources into objects for the architectures. The host compiler gets
# the warnings of misa_flags except -Wpedantic, which nvcc's generated code does not pass.
function(misa_add_kernels name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_options(${name} PRIVATE
    --expt-relaxed-constexpr --fmad=false
    -Xcompiler=-Wall,-Wextra,-Wshadow,-Wconversion,-Wno-sign-conversion)
endfunction()

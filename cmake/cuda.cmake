# The CUDA side: built where this project is the top level and there is a compiler for it.
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
  # Machine code for A100, L40, H100 and H200, RTX 50; PTX of the newest for what comes after it.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90-real 120)
  endif()
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)
endif()

# The kernels of these sources as objects, for some architectures. What misa_flags says to the host
# compiler is said to nvcc too; without -Wpedantic, which its generated code does not pass.
function(misa_add_kernels name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_options(${name} PRIVATE
    --expt-relaxed-constexpr --fmad=false
    -Xcompiler=-Wall,-Wextra,-Wshadow,-Wconversion,-Wno-sign-conversion)
  if(PROJECT_IS_TOP_LEVEL)
    target_compile_options(${name} PRIVATE -Werror=all-warnings)
  endif()
endfunction()

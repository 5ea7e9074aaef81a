# SPDX-License-Identifier: Apache-2.0
# What `cmake --install` installs: the library, the program with its man pages, and a package for CMake and one for
# pkg-config. All of it may be moved to another prefix.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS misa EXPORT misa_targets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/misa TYPE INCLUDE)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATAROOTDIR}/doc/misa)
if(TARGET misa_program)
  set_target_properties(misa_program PROPERTIES
    INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")  # finds a shared library in any prefix
  install(TARGETS misa_program)
  find_program(MISA_HELP2MAN help2man)
  if(MISA_HELP2MAN AND NOT CMAKE_CROSSCOMPILING)  # which runs the program
    install(CODE "execute_process(COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/cli/man.sh
      $<TARGET_FILE:misa_program> ${CMAKE_CURRENT_BINARY_DIR}/man1 COMMAND_ERROR_IS_FATAL ANY)")
    install(DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/man1 TYPE MAN)
  endif()
endif()

set(MISA_CONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/misa)
configure_package_config_file(cmake/misa-config.cmake.in misa-config.cmake
  INSTALL_DESTINATION ${MISA_CONFIG_DIR})
write_basic_package_version_file(misa-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
    ${CMAKE_CURRENT_BINARY_DIR}/misa-config.cmake
    ${CMAKE_CURRENT_BINARY_DIR}/misa-config-version.cmake
  DESTINATION ${MISA_CONFIG_DIR})
install(EXPORT misa_targets NAMESPACE misa:: FILE misa-targets.cmake
  DESTINATION ${MISA_CONFIG_DIR})

# A static library's pkg-config file names all that has to be linked, so that `--static` is not
# needed.
set(MISA_PC_REQUIRES "")
set(MISA_PC_LIBS "")
get_target_property(type misa TYPE)
if(type STREQUAL STATIC_LIBRARY)
  set(MISA_PC_REQUIRES "fmt, libhwy, tbb")
  list(TRANSFORM MISA_CXX_RUNTIME PREPEND " -l" OUTPUT_VARIABLE MISA_PC_LIBS)
  if(MISA_BUILD_CUDA)
    list(APPEND MISA_PC_LIBS " ${CUDA_cudart_static_LIBRARY} -lrt -lpthread -ldl")
  endif()
  list(JOIN MISA_PC_LIBS "" MISA_PC_LIBS)
endif()
set(MISA_PC_PREFIX ${CMAKE_INSTALL_PREFIX})
cmake_path(RELATIVE_PATH MISA_PC_PREFIX BASE_DIRECTORY ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig)
cmake_path(APPEND MISA_PC_LIBDIR "\${prefix}" ${CMAKE_INSTALL_LIBDIR})
cmake_path(APPEND MISA_PC_INCLUDEDIR "\${prefix}" ${CMAKE_INSTALL_INCLUDEDIR})
configure_file(cmake/misa.pc.in misa.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/misa.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

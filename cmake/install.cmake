# The C structs may change with the minor version as long as the major one is 0, so the soname holds
# both.
set_target_properties(misa PROPERTIES
  VERSION ${PROJECT_VERSION}
  SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})

install(TARGETS misa EXPORT misa_targets)
install(DIRECTORY include/misa TYPE INCLUDE)
if(TARGET misa_program)
  set_target_properties(misa_program PROPERTIES
    INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")  # finds a shared library in any prefix
  install(TARGETS misa_program)
endif()

include(CMakePackageConfigHelpers)
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

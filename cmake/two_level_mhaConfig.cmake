# find_package(two_level_mha) gives the imported target two_level_mha::ops: the operator library, its headers
# (#include <two_level_mha/ops.h>) and torch, which is looked for first if the caller has not found it.
include(CMakeFindDependencyMacro)
find_dependency(Torch)

get_filename_component(_tlm_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(_tlm_library "${_tlm_package}/_ops.abi3.so")
if(NOT EXISTS "${_tlm_library}")
  set(two_level_mha_FOUND FALSE)
  set(two_level_mha_NOT_FOUND_MESSAGE "${_tlm_library} is missing: build the Python package first")
  return()
endif()

if(NOT TARGET two_level_mha::ops)
  add_library(two_level_mha::ops SHARED IMPORTED)
  set_target_properties(two_level_mha::ops PROPERTIES
    IMPORTED_LOCATION "${_tlm_library}"
    IMPORTED_SONAME "_ops.abi3.so"
    INTERFACE_INCLUDE_DIRECTORIES "${_tlm_package}/include"
    INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}"
    # A wheel of torch finds its own NVIDIA libraries when it runs; the linker may meet older ones of the system.
    # Without new tags the program's rpath, which names torch's folder, holds for the operator library as well.
    INTERFACE_LINK_OPTIONS "-Wl,--allow-shlib-undefined,--disable-new-dtags")
endif()
unset(_tlm_package)
unset(_tlm_library)

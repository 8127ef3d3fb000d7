# tokenspeed_room(NAME MAY_INCLUDE rooms... LIBRARIES targets...)
# One folder of src/ is one static library. Each room's headers are reached through an include directory of its own
# (build/rooms/NAME/NAME -> src/NAME), so a room that does not link another cannot include it.
function(tokenspeed_room name)
  cmake_parse_arguments(ARG "" "" "MAY_INCLUDE;LIBRARIES" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/${name}/*.cpp)
  list(FILTER sources EXCLUDE REGEX "/src/app/main\\.cpp$")
  list(FILTER sources EXCLUDE REGEX "/src/${name}/cuda/")  # libraries of their own, where there is a CUDA toolkit
  # Kernels for one instruction set are files of their own; the rest of the program stays baseline x86-64.
  foreach(source ${sources})
    if(source MATCHES "_avx512_bf16\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
        "-O3;-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512bf16;-mfma;-mf16c;-mprefer-vector-width=512")
    elseif(source MATCHES "_avx512\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
        "-O3;-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mfma;-mf16c;-mprefer-vector-width=512")
    elseif(source MATCHES "_avx2\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-O3;-mavx2;-mfma;-mf16c")
    endif()
  endforeach()
  set(include_directory ${CMAKE_BINARY_DIR}/rooms/${name})
  file(MAKE_DIRECTORY ${include_directory})
  file(CREATE_LINK ${CMAKE_SOURCE_DIR}/src/${name} ${include_directory}/${name} SYMBOLIC)
  if(sources)
    add_library(${name} STATIC ${sources})
    set(scope PUBLIC)
  else()
    add_library(${name} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_include_directories(${name} ${scope} ${include_directory})
  target_link_libraries(${name} ${scope} ${ARG_MAY_INCLUDE} ${ARG_LIBRARIES})
endfunction()

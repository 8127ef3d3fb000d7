# The CUDA parts are configured in where nvcc exists; nothing else of the build needs a GPU or a toolkit.
include(CheckLanguage)
if(TOKENSPEED_CUDA)
  check_language(CUDA)
endif()
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/kernels/cuda/*.cu)
if(TOKENSPEED_CUDA AND CMAKE_CUDA_COMPILER AND cuda_sources AND NOT TOKENSPEED_SANITIZE AND NOT TOKENSPEED_FUZZ)
  set(CMAKE_CUDA_ARCHITECTURES "90a-real")  # -arch=sm_90a in flags would break wgmma; "-real" keeps the binary small
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  add_library(kernels_cuda STATIC ${cuda_sources})
  target_link_libraries(kernels_cuda PUBLIC kernels)
  target_compile_options(kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo --expt-relaxed-constexpr>)
endif()

# The kernels as a static library, for the Python module and for the sanitizer harness (tests/native).

add_library(octavo_kernels STATIC
  ${CMAKE_CURRENT_LIST_DIR}/bandwidth.cpp
  ${CMAKE_CURRENT_LIST_DIR}/kernels.cpp
  ${CMAKE_CURRENT_LIST_DIR}/parallel.cpp
  ${CMAKE_CURRENT_LIST_DIR}/portable.cpp
  ${CMAKE_CURRENT_LIST_DIR}/products.cpp
  ${CMAKE_CURRENT_LIST_DIR}/quantizing.cpp
  ${CMAKE_CURRENT_LIST_DIR}/segments.cpp)
target_include_directories(octavo_kernels PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(octavo_kernels PUBLIC Threads::Threads ${CMAKE_DL_LIBS})
set_target_properties(octavo_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)

if(MSVC)
  target_compile_options(octavo_kernels PRIVATE /O2 /fp:precise)
else()
  # No contraction: what becomes a fused multiply-add is written as one, so that quantizing gives the reference's bytes.
  target_compile_options(octavo_kernels PRIVATE -Wall -Wextra -ffp-contract=off -fno-math-errno)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # The AVX-512 intrinsics of GCC 12 trip over their own undefined operands.
    target_compile_options(octavo_kernels PRIVATE -Wno-maybe-uninitialized)
  endif()
  # A build without a type would be unoptimized; the harness asks for its own level.
  if(NOT OCTAVO_KERNEL_OPTIMIZATION)
    set(OCTAVO_KERNEL_OPTIMIZATION -O3)
  endif()
  target_compile_options(octavo_kernels PRIVATE ${OCTAVO_KERNEL_OPTIMIZATION})
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  target_compile_definitions(octavo_kernels PUBLIC OCTAVO_X86)
  target_sources(octavo_kernels PRIVATE
    ${CMAKE_CURRENT_LIST_DIR}/avx2.cpp ${CMAKE_CURRENT_LIST_DIR}/avx512.cpp
    ${CMAKE_CURRENT_LIST_DIR}/vbmi.cpp ${CMAKE_CURRENT_LIST_DIR}/vbmi_bf16.cpp)
  if(MSVC)
    set(avx2 /arch:AVX2)
    set(avx512 /arch:AVX512)
    set(vbmi /arch:AVX512)
    set(vbmi_bf16 /arch:AVX512)
  else()
    set(avx2 -mavx2 -mfma -mf16c)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
    set(vbmi ${avx512} -mavx512vbmi -mavx512vnni)
    set(vbmi_bf16 ${vbmi} -mavx512bf16)
  endif()
  foreach(isa avx2 avx512 vbmi vbmi_bf16)
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/${isa}.cpp
      TARGET_DIRECTORY octavo_kernels PROPERTIES COMPILE_OPTIONS "${${isa}}")
  endforeach()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$" AND NOT MSVC)
  target_compile_definitions(octavo_kernels PUBLIC OCTAVO_NEON)
  target_sources(octavo_kernels PRIVATE ${CMAKE_CURRENT_LIST_DIR}/neon.cpp)
endif()

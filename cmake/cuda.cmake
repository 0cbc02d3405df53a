# The CUDA half of the build. The same kernel sources (csrc/<family>/cuda/*.cu) are compiled by nvcc into _native_cuda,
# and as host C++ against the emulator in tests/cpp/simt into _native_cuda_emulated and the C++ tests.

set(ONESTEP_CUDA AUTO CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO (where nvcc and a GPU are found)")
set_property(CACHE ONESTEP_CUDA PROPERTY STRINGS AUTO ON OFF)
option(ONESTEP_CUDA_EMULATE "Build the CUDA kernels for the emulator: a Python module and C++ tests" OFF)

# Families with CUDA kernels. A family's folder csrc/<family>/cuda holds its *.cu, *.cpp for the host, and bind.cpp, and tests/cpp/cuda its
# test_<family>.cpp.
if(NOT DEFINED ONESTEP_CUDA_FAMILIES)
  set(ONESTEP_CUDA_FAMILIES attention compensated glm lmhead normal polar)
endif()

if(ONESTEP_CUDA STREQUAL "AUTO")
  find_program(ONESTEP_NVCC nvcc PATHS /usr/local/cuda/bin)
  find_program(ONESTEP_NVIDIA_SMI nvidia-smi)
  set(onestep_cuda FALSE)
  if(ONESTEP_NVCC AND ONESTEP_NVIDIA_SMI)
    execute_process(COMMAND ${ONESTEP_NVIDIA_SMI} -L OUTPUT_VARIABLE onestep_gpus ERROR_QUIET)
    if(onestep_gpus MATCHES "GPU 0")
      set(onestep_cuda TRUE)
    endif()
  endif()
else()
  set(onestep_cuda ${ONESTEP_CUDA})
endif()

if(NOT onestep_cuda AND NOT ONESTEP_CUDA_EMULATE)
  return()
endif()

set(onestep_families_text "")
foreach(family IN LISTS ONESTEP_CUDA_FAMILIES)
  string(APPEND onestep_families_text "ONESTEP_CUDA_FAMILY(${family})\n")
  file(GLOB onestep_${family}_kernels CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/${family}/cuda/*.cu)
  list(APPEND ONESTEP_CUDA_KERNELS ${onestep_${family}_kernels})
  file(GLOB onestep_${family}_host CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/${family}/cuda/*.cpp)
  list(FILTER onestep_${family}_host EXCLUDE REGEX "/bind\\.cpp$")
  list(APPEND ONESTEP_CUDA_HOST ${onestep_${family}_host})
  list(APPEND ONESTEP_CUDA_BINDINGS ${CMAKE_SOURCE_DIR}/csrc/${family}/cuda/bind.cpp)
endforeach()
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/cuda/cuda_families.inc CONTENT "${onestep_families_text}")

# Kernels and bindings find base/…, normal/… as all sources do.
add_library(onestep_cuda_options INTERFACE)
target_include_directories(onestep_cuda_options INTERFACE csrc ${CMAKE_BINARY_DIR}/cuda)

if(onestep_cuda)
  # Machine code for A100 (and, of the same major version, 8.6 and 8.9), and for H100 with the instructions that only it
  # has (wgmma: the "a"); PTX of the former for what comes after.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
  endif()
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
    set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  add_library(onestep_cuda STATIC csrc/base/cuda/runtime.cpp ${ONESTEP_CUDA_HOST} ${ONESTEP_CUDA_KERNELS})
  set_target_properties(onestep_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(
    onestep_cuda
    PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extra-device-vectorization -Xptxas=-v>
            $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${ONESTEP_WERROR}>>:-Werror=all-warnings
            -Xcompiler=-Wall,-Wextra,-Werror,-Wno-unknown-pragmas>
            $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${ONESTEP_WERROR}>>:-Wall;-Wextra;-Werror>)
  target_link_libraries(onestep_cuda PUBLIC onestep_cuda_options CUDA::cudart_static)
  if(ONESTEP_PYTHON)
    pybind11_add_module(_native_cuda NO_EXTRAS csrc/base/cuda/module.cpp ${ONESTEP_CUDA_BINDINGS})
    list(JOIN CMAKE_CUDA_ARCHITECTURES " " onestep_architectures)
    target_compile_definitions(_native_cuda PRIVATE ONESTEP_CUDA_ARCHITECTURES="${onestep_architectures}")
    set_target_properties(_native_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
    target_link_libraries(_native_cuda PRIVATE onestep_cuda)
    set_target_properties(_native_cuda PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 3)
    install(TARGETS _native_cuda DESTINATION onestep)
  endif()
endif()

if(ONESTEP_CUDA_EMULATE)
  # nvcc's file names are not a C++ compiler's: each kernel file is included by a .cpp of its own.
  foreach(kernel IN LISTS ONESTEP_CUDA_KERNELS)
    file(RELATIVE_PATH included ${CMAKE_SOURCE_DIR}/csrc ${kernel})
    string(REPLACE "/" "_" name ${included})
    set(wrapper ${CMAKE_BINARY_DIR}/cuda/emulated_${name}.cpp)
    file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${included}\"\n")
    list(APPEND ONESTEP_EMULATED_KERNELS ${wrapper})
  endforeach()
  add_library(onestep_cuda_emulated STATIC csrc/base/cuda/runtime.cpp tests/cpp/simt/simt.cpp tests/cpp/simt/fiber.cpp
                                           tests/cpp/simt/races.cpp ${ONESTEP_CUDA_HOST} ${ONESTEP_EMULATED_KERNELS})
  target_compile_definitions(onestep_cuda_emulated PUBLIC ONESTEP_SIMT)
  target_include_directories(onestep_cuda_emulated PUBLIC tests/cpp/simt)
  if(ONESTEP_SANITIZE STREQUAL "thread")
    # A race detector: see simt.hpp. The emulator itself is not looked at, and switches fibers between calls.
    target_compile_definitions(onestep_cuda_emulated PUBLIC ONESTEP_SIMT_TSAN)
    set_source_files_properties(tests/cpp/simt/simt.cpp tests/cpp/simt/fiber.cpp tests/cpp/simt/races.cpp
                                PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)
  endif()
  # `#pragma unroll` is nvcc's.
  target_compile_options(onestep_cuda_emulated PUBLIC -Wno-unknown-pragmas PRIVATE -O1)
  target_link_libraries(onestep_cuda_emulated PUBLIC onestep_options onestep_cuda_options)
  if(ONESTEP_PYTHON)
    pybind11_add_module(_native_cuda_emulated NO_EXTRAS csrc/base/cuda/module.cpp ${ONESTEP_CUDA_BINDINGS})
    target_link_libraries(_native_cuda_emulated PRIVATE onestep_cuda_emulated)
    target_compile_options(_native_cuda_emulated PRIVATE -O1)
    set_target_properties(_native_cuda_emulated PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 3)
  endif()
  if(ONESTEP_TESTS)
    add_executable(test_simt tests/cpp/simt/test_simt.cpp)
    target_link_libraries(test_simt PRIVATE onestep_cuda_emulated)
    add_test(NAME simt COMMAND test_simt)
    if(ONESTEP_SANITIZE STREQUAL "thread")
      foreach(mistake barrier second-barrier syncwarp named-barrier copies)
        add_test(NAME simt_race_${mistake} COMMAND test_simt ${mistake})
        set_tests_properties(simt_race_${mistake} PROPERTIES PASS_REGULAR_EXPRESSION "data race")
      endforeach()
    elseif(ONESTEP_SANITIZE)
      # A store past the end of shared memory must end the program.
      add_test(NAME simt_out_of_bounds COMMAND test_simt out-of-bounds)
      set_tests_properties(simt_out_of_bounds PROPERTIES PASS_REGULAR_EXPRESSION "heap-buffer-overflow")
    endif()
    foreach(family IN LISTS ONESTEP_CUDA_FAMILIES)
      file(GLOB onestep_reference csrc/${family}/*ref*.cpp)
      add_executable(test_cuda_${family} tests/cpp/cuda/test_${family}.cpp ${onestep_reference}
                                           tests/cpp/faults.cpp csrc/base/target.cpp csrc/base/parallel.cpp csrc/base/pool.cpp csrc/base/scheduling.cpp csrc/base/workspace.cpp)
      target_include_directories(test_cuda_${family} PRIVATE tests/cpp)
      target_link_libraries(test_cuda_${family} PRIVATE onestep_cuda_emulated)
      add_test(NAME cuda_${family} COMMAND test_cuda_${family})
    endforeach()
    # The longest starts first.
    if(TEST cuda_attention)
      set_tests_properties(cuda_attention PROPERTIES COST 1000)
    endif()
  endif()
endif()

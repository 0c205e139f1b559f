# SPDX-License-Identifier: Apache-2.0
# What the C++ tests and the simulated runtime share: language, flags, sanitizer, and the host's half
# of csrc, compiled once, as `hift_host`. For every target: ${optimise} ${sanitizer}.
include_guard(GLOBAL)

set(SANITIZE "" CACHE STRING "thread, address (with undefined), or nothing")
set(CSRC ${CMAKE_CURRENT_LIST_DIR}/../../csrc CACHE PATH "the sources under test")
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
find_package(Threads REQUIRED)

add_compile_options(-Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp-simd)
include_directories(${CSRC} ${CMAKE_CURRENT_LIST_DIR})

# -O1 keeps reports readable and the loops vectorised enough; the product's own flags otherwise.
set(sanitizer "")
set(optimise -O1 -g1)
if(SANITIZE STREQUAL "thread")
  set(sanitizer -fsanitize=thread)
elseif(SANITIZE STREQUAL "address")
  set(sanitizer -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(SANITIZE STREQUAL "")
  set(optimise -O3)
else()
  message(FATAL_ERROR "SANITIZE must be 'thread', 'address' or empty, not '${SANITIZE}'")
endif()
add_link_options(${sanitizer})

file(GLOB host_sources CONFIGURE_DEPENDS ${CSRC}/paging/*.cpp ${CSRC}/cpu/*.cpp)
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(FILTER host_sources EXCLUDE REGEX "cpu/step_avx[0-9]+\\.cpp$")
endif()
add_library(hift_host OBJECT ${host_sources})
target_compile_options(hift_host PRIVATE ${optimise} ${sanitizer})
target_link_libraries(hift_host PUBLIC Threads::Threads)

# How everything is compiled. One place, so that a preset is two cache variables and no flags.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release | Debug | RelWithDebInfo" FORCE)
endif()
set(ICECACHE_SANITIZE "" CACHE STRING "address | thread | empty for none")
option(ICECACHE_WERROR "Warnings are errors" ON)
set(ICECACHE_MARCH "x86-64-v3" CACHE STRING "Baseline instruction set; Highway dispatches above it")

# -Wrestrict: false alarms in g++ 12 on string concatenation (GCC bug 105651).
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wno-missing-field-initializers;-Wno-restrict>")
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wnon-virtual-dtor>)
if(ICECACHE_WERROR)
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-Werror>)
  # Warnings that g++ 12 makes of its own inlining have false alarms: they are shown and do not stop a build.
  foreach(w stringop-overread stringop-overflow array-bounds maybe-uninitialized free-nonheap-object)
    add_compile_options($<$<CXX_COMPILER_ID:GNU>:-Wno-error=${w}>)
  endforeach()
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-march=${ICECACHE_MARCH}>)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1")  # dev and sanitizer presets: asserts on, still quick enough to serve a model

if(ICECACHE_SANITIZE STREQUAL "address")
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
elseif(ICECACHE_SANITIZE STREQUAL "thread")
  # Asio 1.74 uses atomic_thread_fence, which g++ warns about under TSan.
  add_compile_options(-fsanitize=thread -fno-omit-frame-pointer -Wno-tsan)
  add_link_options(-fsanitize=thread)
elseif(ICECACHE_SANITIZE)
  message(FATAL_ERROR "ICECACHE_SANITIZE=${ICECACHE_SANITIZE}: use address, thread or nothing")
endif()

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
  # The compiler's own list of headers suffices: without it a file that is not in the cache is preprocessed twice, an eighth
  # of a cold build. A header's hash is kept as long as its inode is the same: that of 100 MB of precompiled headers
  # would cost what they win.
  set(CMAKE_CXX_COMPILER_LAUNCHER env CCACHE_DEPEND=true CCACHE_INODECACHE=true
                                  CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE})
endif()

# icecache_library(NAME SOURCES... [LINK libs...]): a static library whose headers are included by
# their path from the repository's root, so that an include line shows the layer it reaches into.
function(icecache_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK;PRIVATE_LINK" ${ARGN})
  foreach(f ${ARG_SOURCES})
    if(NOT IS_ABSOLUTE ${f} AND NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${f})
      list(REMOVE_ITEM ARG_SOURCES ${f})
    endif()
  endforeach()
  if(NOT ARG_SOURCES)  # a module that has only headers so far
    add_library(${name} INTERFACE)
    target_include_directories(${name} INTERFACE ${PROJECT_SOURCE_DIR})
    target_link_libraries(${name} INTERFACE ${ARG_LINK})
    return()
  endif()
  add_library(${name} STATIC ${ARG_SOURCES})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PUBLIC ${ARG_LINK} PRIVATE ${ARG_PRIVATE_LINK})
endfunction()

function(icecache_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  list(GET ARG_SOURCES 0 main)
  if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${main})
    add_custom_target(${name})
    return()
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LINK})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
endfunction()

# What every test process needs: UCX must leave signals and malloc alone (sanitizers), and lose no errors.
set(ICECACHE_TEST_ENVIRONMENT
    "UCX_MEM_EVENTS=n" "UCX_ERROR_SIGNALS=" "UCX_HANDLE_ERRORS=none" "OPENBLAS_NUM_THREADS=1"
    "ICECACHE_BIN_DIR=${PROJECT_BINARY_DIR}/bin" "ICECACHE_SOURCE_DIR=${PROJECT_SOURCE_DIR}"
    "ASAN_OPTIONS=detect_leaks=1"
    "TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:suppressions=${PROJECT_SOURCE_DIR}/tests/tsan.supp")

# Reading the same headers is half of compiling a test: they are read once, which makes it a quarter to a third shorter.
# Tests only: a library's file must name all it includes. -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON does without.
function(icecache_test_headers)
  file(CONFIGURE OUTPUT test_headers.cc CONTENT "")
  add_library(icecache_test_headers OBJECT ${CMAKE_CURRENT_BINARY_DIR}/test_headers.cc)
  target_link_libraries(icecache_test_headers PRIVATE GTest::gmock)
  # Exactly as a program is compiled, or it is of no use to one.
  set_target_properties(icecache_test_headers PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_compile_options(icecache_test_headers PRIVATE -fPIE ${ICECACHE_TEST_OPTIONS})
  target_precompile_headers(icecache_test_headers PRIVATE <gmock/gmock.h>)
endfunction()

# A third less to compile; what is tested is in libraries, optimised as ever.
set(ICECACHE_TEST_OPTIONS $<$<CONFIG:Release>:-O1>)

# icecache_test(FILE.cc [LINK libs...] [LABELS l...] [TIMEOUT s] [SERIAL]): one GoogleTest program = one ctest
# entry, named after the file. SERIAL: starts processes of its own; one such test at a time, beside others.
function(icecache_test file)
  cmake_parse_arguments(ARG "SERIAL" "TIMEOUT" "LINK;LABELS;DEPENDS" ${ARGN})
  get_filename_component(name ${file} NAME_WE)
  add_executable(${name} ${file})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_LINK} GTest::gmock GTest::gtest_main)
  target_compile_options(${name} PRIVATE ${ICECACHE_TEST_OPTIONS})
  target_precompile_headers(${name} REUSE_FROM icecache_test_headers)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests/bin)
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(ICECACHE_SANITIZE)  # 5 to 20 times slower
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 5")
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}"
                       ENVIRONMENT "${ICECACHE_TEST_ENVIRONMENT}")
  if(ARG_SERIAL)
    set_tests_properties(${name} PROPERTIES RESOURCE_LOCK processes)
  endif()
  if(ARG_DEPENDS)
    add_dependencies(${name} ${ARG_DEPENDS})
  endif()
endfunction()

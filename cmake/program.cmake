if(EXISTS ${CMAKE_SOURCE_DIR}/src/app/main.cpp)
  add_executable(tokenspeed src/app/main.cpp)
  target_link_libraries(tokenspeed PRIVATE app)
  # The program is build/tokenspeed whatever the preset last built.
  add_custom_command(TARGET tokenspeed POST_BUILD
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_SOURCE_DIR}/build
    COMMAND ln -sfn $<TARGET_FILE:tokenspeed> ${CMAKE_SOURCE_DIR}/build/tokenspeed)
endif()

# Cross-compiles for 64-bit ARM; the check then runs under an emulator (packages g++-aarch64-linux-gnu and qemu-user):
#   cmake -S tests/native -B build/aarch64 -DSANITIZE= -DCMAKE_TOOLCHAIN_FILE=$PWD/tests/native/aarch64.cmake
#   cmake --build build/aarch64 && qemu-aarch64 build/aarch64/check
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Static: the emulator needs no ARM libraries.
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)

// std::shared_ptr asks glibc, from 2.32 on, whether there is one thread only, to save atomic operations. The answer here is
// always no, so that the library also runs on older systems (manylinux_2_28).
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

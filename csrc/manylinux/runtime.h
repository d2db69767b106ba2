// Included before every source of a wheel (HSAID_MANYLINUX in CMakeLists.txt): what a newer GCC's headers would
// otherwise use is not in the C++ runtime (GCC 8's) and the glibc of the oldest systems that torch's own wheels serve.
#pragma once

// What containers throw at absurd sizes: until GCC 11 it was this base class of bad_array_new_length.
#define __throw_bad_array_new_length __throw_bad_alloc

// Reference counts are always atomic, as they were before glibc 2.32 could say that there is only one thread.
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
static constexpr char hsaid_single_threaded = 0;
#define __libc_single_threaded hsaid_single_threaded
#endif

// String streams, with the members that GCC 9 and 11 added, are compiled into the library. No other template is: the
// runtime finds the parts of a locale by the addresses of its own.
#include <istream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1

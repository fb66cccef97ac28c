/* Which instruction sets this build has and this CPU can run. */

#include "native.h"

const char *engine_name(int engine)
{
    static const char *const names[ENGINE_COUNT] = {"scalar", "ssse3", "avx2", "neon", "avx512"};
    return names[engine];
}

int engine_available(int engine)
{
    switch (engine) {
    case ENGINE_SCALAR:
        return 1;
#if defined(__x86_64__) || defined(__i386__)
    case ENGINE_SSSE3:
        return __builtin_cpu_supports("ssse3") != 0;
    case ENGINE_AVX2:
        return __builtin_cpu_supports("avx2") != 0; /* asks the OS too whether it saves the registers */
    case ENGINE_AVX512:
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi");
#elif defined(__aarch64__)
    case ENGINE_NEON:
        return 1; /* part of the base architecture */
#endif
    default:
        return 0;
    }
}

int engine_best(void)
{
    static const int fastest_first[] = {ENGINE_AVX512, ENGINE_AVX2, ENGINE_NEON, ENGINE_SSSE3};
    for (size_t i = 0; i < sizeof fastest_first / sizeof *fastest_first; i++)
        if (engine_available(fastest_first[i]))
            return fastest_first[i];
    return ENGINE_SCALAR;
}

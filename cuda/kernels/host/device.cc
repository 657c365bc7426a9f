// Runs the kernels that device.h describes, and is what host.rs calls.
#include "device.h"
#include <csetjmp>
#include <cstdlib>
#include <mutex>
#include <ucontext.h>
#include <vector>

namespace grist_host {

dim3 thread_index, block_index, block_dim, grid_dim;
constexpr unsigned MOST_THREADS = 1024, STACK = 64 << 10, SHARED = 228 << 10;
alignas(16) unsigned char shared_memory[SHARED];

enum Waits { FOR_NOTHING, FOR_WARP, FOR_BLOCK };

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    char *stack;
    bool started, done;
    Waits waits;
};
static Fiber fibers[MOST_THREADS];
struct Copy {
    void *to;
    const void *from;
    unsigned group;
};
static std::vector<Copy> copies[MOST_THREADS];
static unsigned committed[MOST_THREADS];
static Lane slots[MOST_THREADS];
static unsigned current;
static jmp_buf scheduler;
static ucontext_t unused;
static void (*kernel)(const void *);
static const void *kernel_args;

struct Entry {
    const char *name;
    void (*run)(const void *);
};
static Entry entries[256];
static unsigned n_entries;

Register::Register(const char *name, void (*run)(const void *)) {
    if (n_entries < 256) entries[n_entries++] = {name, run};
}

unsigned lane() { return current % 32; }
Lane *lanes() { return slots + current / 32 * 32; }

static void wait(Waits what) {
    fibers[current].waits = what;
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
void wait_for_block() { wait(FOR_BLOCK); }
void wait_for_warp() { wait(FOR_WARP); }

void copy_async(void *to, const void *from) { copies[current].push_back({to, from, committed[current]}); }
void commit_copies() { committed[current]++; }
void wait_for_copies(unsigned groups) {
    std::vector<Copy> &all = copies[current];
    size_t n = 0;
    for (; n < all.size() && all[n].group + groups < committed[current]; n++) memcpy(all[n].to, all[n].from, 16);
    all.erase(all.begin(), all.begin() + long(n));
}

static void begin_fiber() {
    kernel(kernel_args);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

// Until the fiber waits or is done.
static void resume(unsigned i) {
    current = i;
    thread_index = {i, 0, 0};
    Fiber &f = fibers[i];
    if (_setjmp(scheduler)) return;
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = nullptr;
    makecontext(&f.start, begin_fiber, 0);
    swapcontext(&unused, &f.start);
}

// One block; false if its threads wait for each other for ever.
static bool run_block(bool reversed) {
    const unsigned n = block_dim.x;
    memset(shared_memory, 0xff, sizeof shared_memory);
    for (unsigned i = 0; i < n; i++) fibers[i].started = fibers[i].done = false, fibers[i].waits = FOR_NOTHING, copies[i].clear(), committed[i] = 0;
    for (;;) {
        bool moved = false;
        for (unsigned w = 0; w < n; w += 32) {
            const unsigned first = reversed ? (n - 1) / 32 * 32 - w : w, last = first + 32 < n ? first + 32 : n;
            bool all = true;
            do {
                bool any = false;
                for (unsigned k = first; k < last; k++) {
                    const unsigned i = reversed ? first + last - 1 - k : k;
                    if (fibers[i].done || fibers[i].waits != FOR_NOTHING) continue;
                    resume(i);
                    moved = true;
                }
                all = true;
                for (unsigned i = first; i < last; i++) {
                    all &= fibers[i].done || fibers[i].waits == FOR_WARP;
                    any |= !fibers[i].done;
                }
                all &= any;
                for (unsigned i = first; all && i < last; i++) fibers[i].waits = FOR_NOTHING;
            } while (all);
        }
        bool done = true, at_barrier = true;
        for (unsigned i = 0; i < n; i++) {
            done &= fibers[i].done;
            at_barrier &= fibers[i].done || fibers[i].waits == FOR_BLOCK;
        }
        if (done) return true;
        if (at_barrier) {
            for (unsigned i = 0; i < n; i++) fibers[i].waits = FOR_NOTHING;
        } else if (!moved) {
            return false;
        }
    }
}

float as_half(uint32_t r, unsigned j) { return half_to_float(uint16_t(r >> (16 * j))); }

} // namespace grist_host

float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(fraction), -24);
    const uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
    return __int_as_float(int(bits));
}

uint16_t float_to_half(float f) {
    const uint32_t bits = uint32_t(__float_as_int(f)), sign = bits >> 16 & 0x8000;
    const float size = std::fabs(f);
    if (size != size) return uint16_t(sign | 0x7e00);
    if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
    int exponent = 0;
    std::frexp(size, &exponent);
    // Ten bits below the leading one; fixed below the smallest normal.
    const int step = (exponent < -13 ? -13 : exponent) - 11;
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(size, -step)));
    return uint16_t(sign | (units < 1024 ? units : uint32_t(step + 24) * 1024 + units));
}

uint16_t float_to_bfloat(float f) {
    const uint32_t bits = uint32_t(__float_as_int(f));
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 0: done; 1: no such kernel; 2: threads wait for each other for ever; 3: a shape that no device takes.
extern "C" int grist_host_launch(const char *name, const unsigned *grid, unsigned threads, unsigned shared, const void *args, int reversed) {
    using namespace grist_host;
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    if (threads == 0 || threads > MOST_THREADS || shared > SHARED || !grid[0] || !grid[1] || !grid[2]) return 3;
    const Entry *entry = nullptr;
    for (unsigned i = 0; i < n_entries; i++)
        if (!strcmp(entries[i].name, name)) entry = &entries[i];
    if (!entry) return 1;
    kernel = entry->run;
    kernel_args = args;
    block_dim = {threads, 1, 1};
    grid_dim = {grid[0], grid[1], grid[2]};
    for (unsigned i = 0; i < threads; i++)
        if (!fibers[i].stack) fibers[i].stack = (char *)malloc(STACK);
    const unsigned n = grid[0] * grid[1] * grid[2];
    for (unsigned b = 0; b < n; b++) {
        const unsigned i = reversed ? n - 1 - b : b;
        block_index = {i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
        if (!run_block(reversed)) return 2;
    }
    return 0;
}

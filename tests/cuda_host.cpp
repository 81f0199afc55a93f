// The scheduler behind cuda_host.h. No sanitiser instruments it, since fibers pass its own data around without the
// order that they need elsewhere; SPECDEC_SANITISED keeps to switches that sanitisers know, SPECDEC_TSAN tells the one
// for threads what is a thread and which order barriers make.
#include "cuda_host.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#ifdef SPECDEC_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
constexpr unsigned kNoOrder = 1;
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace cuda_host {
namespace {

constexpr int kMaxFibers = 2048, kBarriers = 4;
constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  void* tsan;
  char* stack;
  int block, thread;
  bool started;
};

// Where fibers wait. What one side wrote before is ordered before what the other reads after through `order`, which
// alternates, so that who leaves late is not ordered after what came later.
struct Place {
  Fiber* waiting[kMaxFibers];
  unsigned arrived;
  int turn;
  char order[2];
};

struct Warp {
  Place place;
  Meeting kind;
  uint64_t values[2][32];
};

Fiber fibers[kMaxFibers];
Place barriers[64][kBarriers];
Warp warps[64][32];
Fiber* ready[kMaxFibers + 1];
int first_ready, num_ready, running, threads_of_block;
Fiber* current;
ucontext_t main_context;
const char* failure;
void (*entry)(void*, int);
void* entry_argument;
char start_order, end_order;
#ifdef SPECDEC_TSAN
void* main_tsan;
#endif

void make_ready(Fiber* fiber) { ready[(first_ready + num_ready++) % (kMaxFibers + 1)] = fiber; }

void leave_to_main() {
#ifdef SPECDEC_TSAN
  __tsan_switch_to_fiber(main_tsan, kNoOrder);
#endif
  setcontext(&main_context);
}

// Gives way to the next fiber that can run: by jumps, which spare swapcontext's system calls, but not under sanitisers.
void give_way(bool comes_back) {
  if (num_ready == 0) {
    if (running > 0 && failure == nullptr) failure = "threads wait for each other in vain";
    leave_to_main();
  }
  Fiber* before = current;
  Fiber* next = ready[first_ready];
  first_ready = (first_ready + 1) % (kMaxFibers + 1);
  --num_ready;
  if (next == before) return;
  current = next;
#ifdef SPECDEC_TSAN
  __tsan_switch_to_fiber(next->tsan, kNoOrder);
#endif
#ifdef SPECDEC_SANITISED
  if (comes_back)
    swapcontext(&before->context, &next->context);
  else
    setcontext(&next->context);
#else
  if (comes_back && _setjmp(before->jump) != 0) return;
  if (next->started) _longjmp(next->jump, 1);
  next->started = true;
  setcontext(&next->context);
#endif
}

void body_of_fiber() {
  __tsan_acquire(&start_order);
  entry(entry_argument, current->block);
  __tsan_release(&end_order);
  --running;
  give_way(false);
}

void wait_at(Place& place, unsigned count, bool orders) {
  char* order = &place.order[place.turn];
  if (orders) __tsan_release(order);
  if (place.arrived + 1 == count) {
    for (unsigned i = 0; i < place.arrived; ++i) make_ready(place.waiting[i]);
    place.arrived = 0;
    place.turn = 1 - place.turn;
    make_ready(current);  // who comes last is not the first to go on
  } else {
    place.waiting[place.arrived++] = current;
  }
  give_way(true);
  if (orders) __tsan_acquire(order);
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(current->thread)}; }
Index block_size() { return {static_cast<unsigned>(threads_of_block)}; }
unsigned lane() { return static_cast<unsigned>(current->thread) % 32; }

void barrier(unsigned id, unsigned count) { wait_at(barriers[current->block][id], count, true); }

const uint64_t* meet(Meeting kind, uint64_t value) {
  Warp& warp = warps[current->block][current->thread / 32];
  if (warp.place.arrived == 0) {
    warp.kind = kind;
  } else if (warp.kind != kind) {
    failure = "lanes of a warp meet for different things";
    leave_to_main();
  }
  uint64_t* values = warp.values[warp.place.turn];
  values[lane()] = value;
  wait_at(warp.place, 32, kind == Meeting::kSync);
  return values;
}

void yield() {
  make_ready(current);
  give_way(true);
}

const char* run(int blocks, int threads, void (*body)(void*, int), void* argument) {
  if (blocks > 64 || threads > 1024 || threads % 32 != 0 || blocks * threads > kMaxFibers) return "too many threads";
  std::memset(barriers, 0, sizeof(barriers));
  std::memset(warps, 0, sizeof(warps));
  entry = body;
  entry_argument = argument;
  failure = nullptr;
  threads_of_block = threads;
  first_ready = num_ready = 0;
  running = blocks * threads;
  __tsan_release(&start_order);
  for (int i = running - 1; i >= 0; --i) {  // the last thread first: a GPU promises no order
    Fiber& fiber = fibers[i];
    if (fiber.stack == nullptr) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) return "no memory for stacks";
      fiber.stack = static_cast<char*>(memory);
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body_of_fiber, 0);
    fiber.block = i / threads;
    fiber.thread = i % threads;
    fiber.started = false;
#ifdef SPECDEC_TSAN
    fiber.tsan = __tsan_create_fiber(0);
#endif
    make_ready(&fiber);
  }
  volatile bool back = false;
#ifdef SPECDEC_TSAN
  main_tsan = __tsan_get_current_fiber();
#endif
  getcontext(&main_context);
  if (!back) {
    back = true;
    Fiber host{};
    current = &host;
    give_way(true);
  }
#ifdef SPECDEC_TSAN
  for (int i = 0; i < blocks * threads; ++i) __tsan_destroy_fiber(fibers[i].tsan);
#endif
  __tsan_acquire(&end_order);
  return failure;
}

}  // namespace cuda_host

// The CUDA kernel of compact_kv_, run by loops on the host: the same launches, the same columns, no GPU.
#include "../csrc/cuda/kv.h"

using namespace specdec::kv;

namespace {

// Columns in any order give the same bytes; backwards, since a GPU promises no order either.
void run(const Launch& launch) {
  for (int32_t c = launch.num_caches - 1; c >= 0; --c) {
    for (int32_t b = launch.paths.batch - 1; b >= 0; --b) {
      for (int64_t item = num_items(launch, c) - 1; item >= 0; --item) move_item(launch, c, b, item);
    }
  }
}

}  // namespace

// Returns the number of launches; `widths` receives the bytes of each cache's vectors.
extern "C" int compact_kv_on_host(int count, char** data, const int64_t* sizes, const int64_t* strides,
                                  const int64_t* itemsizes, const int32_t* nodes, int batch, int steps,
                                  const int32_t* prefix_lens, const int32_t* block_table, int table_width,
                                  int* widths) {
  Launch launch{};
  launch.paths = {nodes, prefix_lens, block_table, steps, 1, 1, table_width, 1, batch, steps, table_width};
  int launches = 1;
  for (int i = 0; i < count; ++i) {
    const Geometry g = geometry_of(data[i], sizes + 4 * i, strides + 4 * i, itemsizes[i], block_table != nullptr);
    widths[i] = g.width;
    if (!add(launch, data[i], g)) {
      run(launch);
      launch.num_caches = launch.num_geometries = 0;
      ++launches;
      add(launch, data[i], g);
    }
  }
  run(launch);
  return launches;
}

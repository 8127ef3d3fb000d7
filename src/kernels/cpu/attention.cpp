#include "kernels/attention.h"

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/rows.h"

namespace tokenspeed::kernels::cpu {
namespace {

// Rows of one sequence that share their loads of keys and values.
struct Tile {
  int32_t sequence = 0;
  int64_t begin = 0;
  int64_t end = 0;
};
constexpr int64_t kTileTokens = 8;

// Softmax sums of the rows of a tile: [row][head_dim] and two scalars per row.
struct Sums {
  float* greatest = nullptr;
  float* total = nullptr;
  float* sum = nullptr;
  static int64_t floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }
  static Sums at(float* data, int64_t rows) { return {data, data + rows, data + 2 * rows}; }
};

// Every code of float8_e4m3 as float32.
const float* float8_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> all;
    for (size_t code = 0; code < all.size(); ++code) all[code] = float8_e4m3_to_float(static_cast<uint8_t>(code));
    return all;
  }();
  return values.data();
}

class Attention {
 public:
  explicit Attention(const PagedAttention& args)
      : args_(args), group_(args.shape.query_heads / args.shape.kv_heads), head_dim_(args.shape.head_dim) {
    for (int32_t s = 0; s < args.batch.sequences; ++s) {
      for (int64_t t = args.batch.token_begin[s]; t < args.batch.token_begin[s + 1]; t += kTileTokens) {
        tiles_.push_back({s, t, std::min<int64_t>(t + kTileTokens, args.batch.token_begin[s + 1])});
      }
    }
    for (const Tile& tile : tiles_) most_partitions_ = std::max(most_partitions_, partitions(tile));
  }

  void run(ThreadPool& pool) {
    const int64_t heads = args_.shape.kv_heads;
    const int64_t tasks = static_cast<int64_t>(tiles_.size()) * heads;
    // Few tiles with a long context (decode): the partitions too are spread over the threads.
    if (pool.size() > 1 && most_partitions_ > 1 && tasks < 4 * pool.size()) {
      run_split(pool, tasks);
    } else {
      pool.parallel_for(tasks,
                        [&](int64_t task) { run_tile(tiles_[static_cast<size_t>(task / heads)], task % heads); });
    }
  }

 private:
  int64_t rows(const Tile& tile) const { return (tile.end - tile.begin) * group_; }
  int64_t keys(const Tile& tile) const { return args_.batch.position[tile.end - 1] + 1; }
  int64_t partitions(const Tile& tile) const { return (keys(tile) + kAttentionPartition - 1) / kAttentionPartition; }

  void run_tile(const Tile& tile, int64_t kv_head) const {
    thread_local std::vector<float> buffer;
    const int64_t size = Sums::floats(kTileTokens * group_, head_dim_);
    if (static_cast<int64_t>(buffer.size()) < 2 * size) buffer.resize(static_cast<size_t>(2 * size));
    const Sums part = Sums::at(buffer.data() + size, rows(tile));
    const Sums whole = Sums::at(buffer.data(), rows(tile));
    clear(whole, rows(tile));
    for (int64_t p = 0; p < partitions(tile); ++p) {
      attend(tile, kv_head, p, part);
      merge(part, rows(tile), whole);
    }
    finish(tile, kv_head, whole);
  }

  void run_split(ThreadPool& pool, int64_t tasks) const {
    const int64_t heads = args_.shape.kv_heads;
    const int64_t size = Sums::floats(kTileTokens * group_, head_dim_);
    std::vector<float> buffer(static_cast<size_t>(tasks * (most_partitions_ + 1) * size));
    const auto sums = [&](int64_t task, int64_t p, int64_t rows) {
      return Sums::at(buffer.data() + (task * (most_partitions_ + 1) + p) * size, rows);
    };
    pool.parallel_for(tasks * most_partitions_, [&](int64_t index) {
      const int64_t task = index / most_partitions_;
      const int64_t p = index % most_partitions_;
      const Tile& tile = tiles_[static_cast<size_t>(task / heads)];
      if (p < partitions(tile)) attend(tile, task % heads, p, sums(task, p, rows(tile)));
    });
    for (int64_t task = 0; task < tasks; ++task) {
      const Tile& tile = tiles_[static_cast<size_t>(task / heads)];
      const Sums whole = sums(task, most_partitions_, rows(tile));
      clear(whole, rows(tile));
      for (int64_t p = 0; p < partitions(tile); ++p) merge(sums(task, p, rows(tile)), rows(tile), whole);
      finish(tile, task % heads, whole);
    }
  }

  void attend(const Tile& tile, int64_t kv_head, int64_t partition, const Sums& out) const {
    thread_local std::vector<float> query;
    query.resize(static_cast<size_t>(rows(tile) * head_dim_));
    thread_local std::vector<int32_t> position;
    position.resize(static_cast<size_t>(rows(tile)));
    for (int64_t row = 0; row < rows(tile); ++row) {
      const int64_t token = tile.begin + row / group_;
      const int64_t head = kv_head * group_ + row % group_;
      position[static_cast<size_t>(row)] = args_.batch.position[token];
      vector_kernels().convert(elements(args_.query, token, head * head_dim_), head_dim_,
                               {query.data() + row * head_dim_, false});
    }
    int64_t offset[kAttentionPartition];
    const int64_t begin = partition * kAttentionPartition;
    const int64_t end = std::min(begin + kAttentionPartition, keys(tile));
    for (int64_t j = begin; j < end; ++j) {
      offset[j - begin] = kv_element_index(args_.pages, args_.batch, tile.sequence, j, kv_head);
    }
    Elements keys = elements(args_.pages.dtype, args_.pages.keys, 0);
    Elements values = elements(args_.pages.dtype, args_.pages.values, 0);
    if (args_.pages.dtype == DType::kFloat8E4M3) {
      thread_local std::vector<float> wide_keys, wide_values;
      keys = widened(args_.pages.keys, offset, end - begin, &wide_keys);
      values = widened(args_.pages.values, offset, end - begin, &wide_values);
      for (int64_t j = 0; j < end - begin; ++j) offset[j] = j * head_dim_;
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim_)));
    vector_kernels().attend({rows(tile), head_dim_, query.data(), position.data(), begin, end, keys, values, offset,
                             scale, out.greatest, out.total, out.sum});
  }

  // FP8 rows at these offsets, one after the other as float32. A partition of them stays in the caches.
  Elements widened(const void* pages, const int64_t* offset, int64_t count, std::vector<float>* wide) const {
    const float* const value = float8_values();
    wide->resize(static_cast<size_t>(count * head_dim_));
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t* const from = static_cast<const uint8_t*>(pages) + offset[j];
      for (int64_t d = 0; d < head_dim_; ++d) (*wide)[static_cast<size_t>(j * head_dim_ + d)] = value[from[d]];
    }
    return {wide->data(), false};
  }

  void clear(const Sums& sums, int64_t rows) const {
    std::fill(sums.greatest, sums.greatest + rows, -std::numeric_limits<float>::infinity());
    std::fill(sums.total, sums.total + rows, 0.0f);
    std::fill(sums.sum, sums.sum + rows * head_dim_, 0.0f);
  }

  void merge(const Sums& part, int64_t rows, const Sums& whole) const {
    for (int64_t row = 0; row < rows; ++row) {
      vector_kernels().merge(part.greatest[row], part.total[row], part.sum + row * head_dim_, head_dim_,
                             &whole.greatest[row], &whole.total[row], whole.sum + row * head_dim_);
    }
  }

  void finish(const Tile& tile, int64_t kv_head, const Sums& sums) const {
    for (int64_t row = 0; row < rows(tile); ++row) {
      const int64_t token = tile.begin + row / group_;
      const int64_t head = kv_head * group_ + row % group_;
      Elements gate;
      if (args_.gate.data != nullptr) gate = elements(args_.gate, token, head * args_.gate_head_stride);
      vector_kernels().finish_attention(sums.sum + row * head_dim_, sums.total[row], gate, head_dim_,
                                        elements(args_.out, token, head * head_dim_));
    }
  }

  const PagedAttention& args_;
  int64_t group_;
  int64_t head_dim_;
  int64_t most_partitions_ = 0;
  std::vector<Tile> tiles_;
};

}  // namespace

void paged_attention(const PagedAttention& args, ThreadPool& pool) { Attention(args).run(pool); }

}  // namespace tokenspeed::kernels::cpu

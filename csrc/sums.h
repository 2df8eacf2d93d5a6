// Sums of columns over many rows, as the gradients of a norm's weight and of a bias are, with the same bits for any
// number of threads: the rows are divided into blocks whose number follows from the shape alone, each block has sums of
// its own in float32, and these are added in the order of the blocks.
#pragma once

#include <algorithm>
#include <memory>

#include "tensor.h"

namespace fastgpt {

constexpr int64_t VALUES_PER_TASK = 16384;  // for fewer, waking a thread takes longer than it saves
inline int64_t rows_per_task(int64_t columns) { return VALUES_PER_TASK / std::max<int64_t>(columns, 1) + 1; }

constexpr int64_t MOST_BLOCKS = 64;         // at most so many partial sums are kept

class SumsOfBlocks {
 public:
  // `kinds` sums of each column are kept, or none.
  SumsOfBlocks(int64_t rows, int64_t columns, int64_t kinds)
      : rows(rows),
        columns(columns),
        kinds(kinds),
        rows_per_block(std::max((rows + MOST_BLOCKS - 1) / MOST_BLOCKS, rows_per_task(columns))),
        blocks((rows + rows_per_block - 1) / rows_per_block),
        partial(kinds > 0 ? new float[static_cast<size_t>(blocks * kinds * columns)]() : nullptr) {}

  // Calls visit(first row, end of the rows, sums) for every block, where `sums` (kinds, columns) are zeros; null where
  // none are kept.
  template <class Visit>
  void for_each_block(const Visit& visit) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        visit(block * rows_per_block, std::min((block + 1) * rows_per_block, rows),
              partial ? partial.get() + block * kinds * columns : nullptr);
    });
  }

  // All the sums, (kinds, columns), as a tensor of these sizes.
  Tensor total(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    Tensor out = new_small(sizes, dtype);
    const int64_t count = kinds * columns;
    const std::unique_ptr<float[]> sum(new float[static_cast<size_t>(count)]);
    SumRows of_blocks{};
    of_blocks.rows = partial.get();
    of_blocks.row_stride = of_blocks.columns = count;
    of_blocks.count = blocks;
    of_blocks.out = sum.get();
    kernels().sum_rows[FLOAT32](of_blocks);
    kernels().narrow[storage_of(out, "sums")](sum.get(), out.mutable_data_ptr(), count);
    return out;
  }

 private:
  const int64_t rows, columns, kinds, rows_per_block, blocks;
  const std::unique_ptr<float[]> partial;
};

}  // namespace fastgpt

// Gram matrices of small problems, one per vector lane.
#pragma once

#include "normal/cpu/pack-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Prefetches rows of the next pack into the second-level cache, since the rows of a small problem are too few for the
// hardware to recognise a stream. Rows are asked for while those of this pack are computed with: all at once, they
// would wait for one another. Matrices whose rows do not follow each other, and packs that would fill the cache, are
// left to the hardware. A prefetch of an address that does not exist does nothing.
template <class T>
class NextPack {
 public:
    NextPack(const PackOperand<T>& from, int64_t rows, int64_t cols) {
        constexpr int64_t kMostBytes = 128 * 1024;
        const int64_t row = cols * static_cast<int64_t>(sizeof(T));
        if (from.col != 1 || from.row != cols || rows * row * kLanes<T> > kMostBytes) {
            return;
        }
        row_ = static_cast<uintptr_t>(row);
        const auto first = reinterpret_cast<uintptr_t>(from.data[0]);
        apart_ = reinterpret_cast<uintptr_t>(from.data[1]) - first;
        next_ = first + apart_ * static_cast<uintptr_t>(kLanes<T>);
    }

    // The rows [begin, begin + count).
    void prefetch(int64_t begin, int64_t count) const {
        constexpr uintptr_t kLine = 64;
        const uintptr_t end = static_cast<uintptr_t>(begin + count) * row_;
        for (uintptr_t offset = static_cast<uintptr_t>(begin) * row_ / kLine * kLine; offset < end; offset += kLine) {
            for (int lane = 0; lane < kLanes<T>; ++lane) {
                const uintptr_t at = next_ + apart_ * static_cast<uintptr_t>(lane) + offset;
                __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
            }
        }
    }

 private:
    uintptr_t next_ = 0, apart_ = 0;
    uintptr_t row_ = 0;  // bytes; 0 prefetches nothing
};

// [A | R] of the pack, which begins at zero. Rows are summed in runs of `kRunRows`; with longer runs than blocks `kept`
// is as large as the matrix.
template <class T, int64_t kRunRows>
inline void pack_gram(const PackArgs<T>& args, Pack<T>& pack, Vec<T>* kept = nullptr) {
    static_assert(kRunRows % kPackRows == 0);
    const bool weighted = args.weight.given;
    const NextPack<T> next_x(args.x, args.n, pack.d);
    const NextPack<T> next_y(args.y, args.n, pack.k);
    // Rows of the next pack that are asked for with each row of tiles.
    const int64_t tile_rows = round_up(pack.d, kPackTileRows) / kPackTileRows;
    const int64_t share = round_up(kPackRows, tile_rows) / tile_rows;
    for (int64_t block = 0; block < args.n; block += kPackRows) {
        const int64_t rows = minimum(kPackRows, args.n - block);
        const PackRun<T> run = {block % kRunRows == 0,
                                (block + kPackRows) % kRunRows == 0 || block + kPackRows >= args.n, kept};
        load_block<T>(args.x, block, rows, pack.d, pack.rows, pack.width);
        load_block<T>(args.y, block, rows, pack.k, pack.rows + pack.d, pack.width);
        if (weighted) {
            Vec<T> weight[kPackRows];
            load_lanes<T>(args.weight, block * args.weight.row, args.weight.row, rows, weight, 1);
            for (int64_t p = 0; p < rows; ++p) {
                const Vec<T> scale = square_root_lanes<T>(weight[p]);
                for (int64_t c = 0; c < pack.d + pack.k; ++c) {
                    pack.rows[p * pack.width + c] *= scale;
                }
            }
        }
        next_y.prefetch(block, rows);
        for (int64_t i = 0; i < pack.d; i += kPackTileRows) {
            const int64_t begin = i / kPackTileRows * share;
            if (begin < rows) {
                next_x.prefetch(block + begin, minimum(share, rows - begin));
            }
            update_pack_tiles<T, 1>(pack.rows, rows, pack.width, i, pack.d + pack.k, pack.a, run);
        }
    }
}

template <class T>
inline int64_t pack_gram_work(int64_t d, int64_t k) {
    return Pack<T>::work(d, k) + Pack<T>::size(d, k) * kLanes<T>;
}

// Rows are summed in the runs of gram_rows, and so with the same bits.
template <class T>
inline void pack_gram_matrices(const PackArgs<T>& args, T* work) {
    Pack<T> pack(args.d, args.k, work);
    pack_gram<T, kBlockRows>(args, pack, reinterpret_cast<Vec<T>*>(work + Pack<T>::work(args.d, args.k)));
    for (int64_t i = 0; i < pack.d; ++i) {
        for (int64_t j = 0; j < pack.d; ++j) {
            pack.out[i * pack.d + j] = pack.a[minimum(i, j) * pack.width + maximum(i, j)];
        }
    }
    store_lanes<T>(pack.out, pack.d * pack.d, args.gram);
    for (int64_t i = 0; i < pack.d; ++i) {
        for (int64_t c = 0; c < pack.k; ++c) {
            pack.out[i * pack.k + c] = pack.a[i * pack.width + pack.d + c];
        }
    }
    store_lanes<T>(pack.out, pack.d * pack.k, args.cross);
}

}  // namespace onestep::normal::ONESTEP_NS

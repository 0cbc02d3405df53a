// Rows of X V: for each element of a row of X, a row of V is read and added, a few vectors of columns at a time.
#pragma once

#include "base/simd-inl.hpp"
#include "sparse/cpu/kernels.hpp"

namespace onestep::sparse::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Vectors of columns that are summed together. Each has two sums, of every other element, so that an addition need not
// wait for the one before: eight registers of the 16 that AVX2 has.
inline constexpr int kMostVectors = 4;
// Up to this many columns are summed one by one. With loops of single numbers the compiler would be free to round
// products in one of the instances and not in another.
inline constexpr int64_t kMostSingle = 3;
// Rows of V are asked for so many elements ahead: they follow no order that the hardware could guess.
inline constexpr int64_t kAhead = 16;

template <class T>
inline int64_t row_length(int64_t k) {
    return k > kMostSingle && k < kLanes<T> ? kLanes<T> : k;
}

// One row of X: elements [begin, end).
template <class T, class Index>
struct SparseRow {
    const Index* indices;
    const T* values;
    int64_t begin, end;
    int64_t last;  // of all elements
};

template <class T, class Index>
ONESTEP_INLINE void ask_ahead(const SparseRow<T, Index>& row, const T* v, int64_t ld, int64_t e) {
    if (e + kAhead < row.last) {
        // An index out of range gives an address that is never read.
        const auto at = reinterpret_cast<uintptr_t>(v) +
                        static_cast<uintptr_t>(row.indices[e + kAhead]) * static_cast<uintptr_t>(ld) * sizeof(T);
        __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    }
}

// The sums of N vectors of columns, which begin at `columns`.
template <int N, class T, class Index>
ONESTEP_INLINE void sum_vectors(const SparseRow<T, Index>& row, const T* v, int64_t ld, const int64_t* columns,
                                bool first, Vec<T>* sums) {
    Vec<T> even[N] = {};
    Vec<T> odd[N] = {};
    int64_t e = row.begin;
    for (; e + 2 <= row.end; e += 2) {
        if (first) {
            ask_ahead(row, v, ld, e);
            ask_ahead(row, v, ld, e + 1);
        }
        const T* a = v + static_cast<int64_t>(row.indices[e]) * ld;
        const T* b = v + static_cast<int64_t>(row.indices[e + 1]) * ld;
        const Vec<T> x = broadcast<T>(row.values[e]);
        const Vec<T> y = broadcast<T>(row.values[e + 1]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            even[j] += x * load<T>(a + columns[j]);
            odd[j] += y * load<T>(b + columns[j]);
        }
    }
    if (e < row.end) {
        const T* a = v + static_cast<int64_t>(row.indices[e]) * ld;
        const Vec<T> x = broadcast<T>(row.values[e]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            even[j] += x * load<T>(a + columns[j]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
        sums[j] = even[j] + odd[j];
    }
}

// Columns in whole vectors; the last one begins so that it ends with the row, and may overlap the one before.
template <int N, class T, class Index>
ONESTEP_INLINE void multiply_group(const SparseRow<T, Index>& row, const T* v, int64_t ld, int64_t first_vector,
                                   T* out) {
    int64_t columns[N];
    Vec<T> sums[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
        columns[j] = minimum((first_vector + j) * kLanes<T>, ld - kLanes<T>);
    }
    sum_vectors<N>(row, v, ld, columns, first_vector == 0, sums);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
        store<T>(out + columns[j], sums[j]);
    }
}

template <class T, class Index>
ONESTEP_INLINE void multiply_row(const SparseRow<T, Index>& row, const T* v, int64_t ld, T* out) {
    const int64_t vectors = (ld + kLanes<T> - 1) / kLanes<T>;
    int64_t done = 0;
    for (; done + kMostVectors <= vectors; done += kMostVectors) {
        multiply_group<kMostVectors>(row, v, ld, done, out);
    }
    switch (vectors - done) {
        case 3:
            return multiply_group<3>(row, v, ld, done, out);
        case 2:
            return multiply_group<2>(row, v, ld, done, out);
        case 1:
            return multiply_group<1>(row, v, ld, done, out);
        default:
            return;
    }
}

// One column: a vector holds as many elements of the row.
template <class T, class Index>
ONESTEP_INLINE T sum_column(const SparseRow<T, Index>& row, const T* column, int64_t ld) {
    Vec<T> sums{};
    for (int64_t e = row.begin; e < row.end; e += kLanes<T>) {
        alignas(ONESTEP_VECTOR_BYTES) T x[kLanes<T>] = {};
        alignas(ONESTEP_VECTOR_BYTES) T y[kLanes<T>] = {};
        const int64_t count = minimum(kLanes<T>, row.end - e);
        for (int64_t lane = 0; lane < count; ++lane) {
            x[lane] = row.values[e + lane];
            y[lane] = column[static_cast<int64_t>(row.indices[e + lane]) * ld];
        }
        sums += load<T>(x) * load<T>(y);
    }
    T sum{};
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        sum += sums[lane];
    }
    return sum;
}

template <class T, class Index>
inline bool multiply_rows(const SparseMultiplyArgs<T>& args, const T* v, int64_t begin, int64_t end) {
    const auto* offsets = static_cast<const Index*>(args.offsets);
    const auto* indices = static_cast<const Index*>(args.indices);
    const int64_t ld = row_length<T>(args.k);
    for (int64_t r = begin; r < end; ++r) {
        const SparseRow<T, Index> row{indices, args.values, offsets[r], offsets[r + 1], args.elements};
        if (row.begin < 0 || row.end < row.begin || row.end > args.elements) {
            return false;
        }
        for (int64_t e = row.begin; e < row.end; ++e) {
            if (static_cast<uint64_t>(indices[e]) >= static_cast<uint64_t>(args.d)) {
                return false;
            }
        }
        T* out = args.out + r * args.k;
        if (args.k <= kMostSingle) {
            for (int64_t c = 0; c < args.k; ++c) {
                out[c] = sum_column(row, v + c, args.k);
            }
        } else if (args.k < ld) {
            alignas(ONESTEP_VECTOR_BYTES) T padded[kLanes<T>];
            multiply_group<1>(row, v, ld, 0, padded);
            for (int64_t c = 0; c < args.k; ++c) {
                out[c] = padded[c];
            }
        } else {
            multiply_row(row, v, ld, out);
        }
    }
    return true;
}

template <class T>
inline bool multiply(const SparseMultiplyArgs<T>& args, const T* v, int64_t begin, int64_t end) {
    return args.wide ? multiply_rows<T, int64_t>(args, v, begin, end) : multiply_rows<T, int32_t>(args, v, begin, end);
}

}  // namespace onestep::sparse::ONESTEP_NS

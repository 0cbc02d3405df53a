// Which kernel takes a pass, with how many blocks. Included by one source for each type of X.
#pragma once

#include <algorithm>
#include <cstddef>

#include "glm/cuda/rows.cuh"
#include "glm/cuda/sums.cuh"
#include "glm/cuda/tile.cuh"

namespace onestep::glm::cuda {

// Blocks are a few waves of the device, and more where a thread would add up more rows than this in T.
inline constexpr int64_t kMostSummedRows = 8192;
// Shared memory that every supported device has.
inline constexpr int64_t kMostTileBytes = int64_t{160} << 10;

template <class X, class T>
using PassKernel = void (*)(PassArgs<X, T>);

// A kernel, and how it is launched.
template <class X, class T>
struct Pass {
    PassKernel<X, T> kernel = nullptr;
    int64_t shared_bytes = 0;
    int64_t blocks = 0;
    int stages = 1;
};

inline int64_t blocks_for(int64_t tiles, int64_t per_processor, int64_t least) {
    const int64_t resident = per_processor * std::max(device_limits().multiprocessors, 1);
    return std::clamp<int64_t>(std::max(resident, least), 1, std::max<int64_t>(tiles, 1));
}

template <class X, class T, int lanes, int chunks, bool point>
Pass<X, T> rows_pass(const GlmData<X, T>& data) {
    const int64_t tile = kRowsInFlight<X, chunks> * (32 / lanes) * kWarps;
    const int64_t summed_rows = kMostSummedRows * kWarps * (32 / lanes);
    return {rows_kernel<X, T, lanes, chunks, point>, rows_shared_bytes<T>(data.rows_of_w()),
            blocks_for(ceil_div(data.n, tile), kRowsResident<X, chunks>, ceil_div(data.n, summed_rows))};
}

template <class X>
inline constexpr int64_t kMostRowsFeatures = 32 * 8 * Chunk<X>::size;

template <class X, class T, int columns>
bool tile_fits(int64_t height) {
    return height <= kMostHeight<columns> && TileLayout<X, T, columns>(height, 1).bytes <= kMostTileBytes;
}

template <class X, class T, int columns, bool point>
Pass<X, T> tile_pass(const GlmData<X, T>& data) {
    const auto bytes = [&](int stages) { return TileLayout<X, T, columns>(height_of(data), stages).bytes; };
    // Of a multiprocessor's shared memory two blocks have half each; the system has a KiB of it for a block.
    const int64_t half = device_limits().shared_bytes / 2 - 1024;
    Pass<X, T> pass;
    pass.kernel = tile_kernel<X, T, columns, point>;
    pass.stages = bytes(2) <= half ? 2 : 1;
    pass.shared_bytes = bytes(pass.stages);
    pass.blocks = blocks_for(ceil_div<int64_t>(data.n, kTileRows), pass.shared_bytes <= half ? kTileResident<T> : 1,
                             ceil_div(data.n, kMostSummedRows));
    return pass;
}

// No kernel for more columns than glm_most_columns.
template <class X, class T, bool point>
Pass<X, T> pass_for(const GlmData<X, T>& data, int64_t m) {
    const int64_t columns = m * data.k;
    const int64_t height = data.rows_of_w();
    if (columns == 1) {
        const int64_t chunks = ceil_div<int64_t>(data.d, Chunk<X>::size);
        if (chunks <= 8) {
            return rows_pass<X, T, 8, 1, point>(data);
        }
        if (chunks <= 32) {
            // Four chunks of 16-bit numbers a lane would leave room for one block on a multiprocessor.
            if constexpr (sizeof(X) == 2) {
                return rows_pass<X, T, 32, 1, point>(data);
            } else {
                return rows_pass<X, T, 8, 4, point>(data);
            }
        }
        if (chunks <= 64) {
            return rows_pass<X, T, 32, 2, point>(data);
        }
        if (chunks <= 256) {
            return rows_pass<X, T, 32, 8, point>(data);
        }
    } else if (columns <= 4 && tile_fits<X, T, 4>(height)) {
        return tile_pass<X, T, 4, point>(data);
    } else if (columns <= 8 && tile_fits<X, T, 8>(height)) {
        return tile_pass<X, T, 8, point>(data);
    } else if (columns <= 16 && tile_fits<X, T, 16>(height)) {
        return tile_pass<X, T, 16, point>(data);
    }
    return {};
}

// The parts of the workspace.
template <class T>
struct Workspace {
    int64_t partial, losses, statuses, bytes;

    Workspace(int64_t blocks, int64_t size) {
        partial = 0;
        losses = whole_chunks(blocks * size * static_cast<int64_t>(sizeof(T)));
        statuses = losses + whole_chunks(blocks * static_cast<int64_t>(sizeof(double)));
        bytes = statuses + whole_chunks(blocks * static_cast<int64_t>(sizeof(int)));
    }
};

template <class U>
U* part(void* workspace, int64_t offset) {
    return reinterpret_cast<U*>(static_cast<char*>(workspace) + offset);
}

template <class X, class T>
Status run(const Pass<X, T>& pass, PassArgs<X, T> args, T* result, double* loss, T* info, void* workspace,
           cudaStream_t stream) {
    if (pass.kernel == nullptr) {
        return device_error("more columns than one pass over X takes");
    }
    const int64_t height = args.data.rows_of_w();
    const int64_t size = height * args.m * args.data.k;
    const Workspace<T> parts(pass.blocks, size);
    args.vector_loads = loads_in_chunks(args.data);
    args.stages = pass.stages;
    args.partial = result != nullptr ? part<T>(workspace, parts.partial) : nullptr;
    args.losses = part<double>(workspace, parts.losses);
    args.statuses = part<int>(workspace, parts.statuses);
    const Status status =
        launch(pass.kernel, dim3(static_cast<unsigned>(pass.blocks)), dim3(kThreads), pass.shared_bytes, stream, args);
    if (status != Status::ok) {
        return status;
    }
    SumArgs<T> sums;
    sums.blocks = pass.blocks;
    sums.height = height;
    sums.k = args.data.k;
    sums.m = args.m;
    sums.partial = args.partial;
    sums.result = result;
    sums.losses = args.losses;
    sums.statuses = args.statuses;
    sums.loss = loss;
    sums.info = info;
    const int64_t blocks = (result != nullptr ? ceil_div<int64_t>(size, kSumElements) : 0) + (loss != nullptr ? 1 : 0);
    return launch(sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, sums);
}

template <class X, class T>
unsigned chunk_blocks(const GlmData<X, T>& data) {
    return static_cast<unsigned>(ceil_div<int64_t>(data.n, kChunkRows));
}

template <class X, class T>
int64_t glm_most_columns(int64_t d, bool intercept) {
    const int64_t height = d + (intercept ? 1 : 0);
    if (tile_fits<X, T, 16>(height)) {
        return 16;
    }
    if (tile_fits<X, T, 8>(height)) {
        return 8;
    }
    if (tile_fits<X, T, 4>(height)) {
        return 4;
    }
    return d <= kMostRowsFeatures<X> ? 1 : 0;
}

template <class X, class T>
int64_t glm_workspace(const GlmData<X, T>& data, int64_t m) {
    // A point's and a product's kernels have the same blocks.
    const Pass<X, T> pass = pass_for<X, T, false>(data, m);
    return Workspace<T>(pass.blocks, data.rows_of_w() * m * data.k).bytes;
}

template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args, T* info, void* workspace, cudaStream_t stream) {
    PassArgs<X, T> pass;
    pass.data = args.data;
    pass.right = args.w;
    pass.curvature = args.curvature;
    return run(pass_for<X, T, true>(args.data, 1), pass, args.gradient, args.loss, info, workspace, stream);
}

template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args, void* workspace, cudaStream_t stream) {
    PassArgs<X, T> pass;
    pass.data = args.data;
    pass.m = static_cast<int>(args.m);
    pass.right = {args.v.data, args.v.row, args.v.col};
    pass.right_stride = args.v.batch[0];
    pass.curvature = const_cast<T*>(args.curvature);
    return run<X, T>(pass_for<X, T, false>(args.data, args.m), pass, args.product, nullptr, nullptr, workspace, stream);
}

template <class X, class T>
Status glm_chunk_point(const GlmData<X, T>& data, T* outputs, T* curvature, double* losses, int* statuses,
                       cudaStream_t stream) {
    PassArgs<X, T> args;
    args.data = data;
    args.curvature = curvature;
    args.losses = losses;
    args.statuses = statuses;
    return launch(chunk_kernel<X, T, true>, dim3(chunk_blocks(data)), dim3(kThreads), 0, stream, args, outputs);
}

template <class X, class T>
Status glm_chunk_product(const GlmData<X, T>& data, int64_t m, T* outputs, const T* curvature, cudaStream_t stream) {
    PassArgs<X, T> args;
    args.data = data;
    args.m = static_cast<int>(m);
    args.curvature = const_cast<T*>(curvature);
    return launch(chunk_kernel<X, T, false>, dim3(chunk_blocks(data)), dim3(kThreads), 0, stream, args, outputs);
}

#define ONESTEP_INSTANTIATE_GLM_PASSES(X, T)                                       \
    template int64_t glm_most_columns<X, T>(int64_t, bool);                        \
    template int64_t glm_workspace(const GlmData<X, T>&, int64_t);                 \
    template Status glm_point(const GlmPointArgs<X, T>&, T*, void*, cudaStream_t); \
    template Status glm_product(const GlmProductArgs<X, T>&, void*, cudaStream_t);

#define ONESTEP_INSTANTIATE_GLM_CHUNKS(T)                                                       \
    template Status glm_chunk_point(const GlmData<T, T>&, T*, T*, double*, int*, cudaStream_t); \
    template Status glm_chunk_product(const GlmData<T, T>&, int64_t, T*, const T*, cudaStream_t);

}  // namespace onestep::glm::cuda

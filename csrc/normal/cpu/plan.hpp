// How the calls of the normal-equations family run on the CPU: size classes, how rows are cut, and work memory.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "normal/cpu/kernels.hpp"
#include "normal/normal.hpp"

namespace onestep {

// Problems that are computed one in each vector lane.
template <class T>
struct PackPlan {
    bool packed = false;
    Layout own_layout;
    Part<T> work;
    Part<T> widened;  // X of 16 bits, of all lanes
};

// A Gram matrix [A | R] of each problem, in rows of `ld` elements.
template <class T>
struct GramPlan {
    const NormalKernels<T>* kernels = nullptr;
    decltype(NormalKernels<T>::gram_rows) gram_rows = nullptr;
    int64_t problems = 0;
    int64_t features = 0;     // rows of the matrix
    int64_t columns = 0;      // features and right-hand sides
    int64_t rows_padded = 0;  // whole tiles
    int64_t ld = 0;
    int64_t panels = 0;  // of columns
    // The rows of X in pieces whose sums are added up in double and in order; or, where there are too few rows but many
    // columns, the panels in groups. One of the two is 1.
    EvenCut pieces;
    int64_t groups = 1;

    // Memory of the whole call.
    Layout layout;
    Part<double> sums;  // of all pieces of all problems; empty where a sum is finished by the thread that began it

    // Memory of a thread while it works on a piece, a group or a problem.
    Layout own_layout;
    Part<T> packed;
    Part<T> slab;      // the sum of as many rows as are summed in T
    Part<double> sum;  // of all slabs of a group or a problem
    Part<T> matrix;    // of a problem

    int64_t size() const { return rows_padded * ld; }
    int64_t parts() const { return pieces.pieces * groups; }
    // Columns further right have more rows above the diagonal: groups hold equal areas of the triangle.
    Range panels_of(int64_t group) const;
    // What a group covers of the matrix: the rows [0, height) of the columns [left, right), as height × ld elements.
    struct Group {
        Range panels;
        int64_t left, right, height, ld;
    };
    Group group_of(int64_t index) const;
};

// Of the entry gram.
template <class T>
struct GramEntryPlan {
    Layout layout;
    PackPlan<T> pack;
    GramPlan<T> gram;  // of problems that are not packed
};

template <class T>
struct MomentsPlan {
    Layout layout;
    GramPlan<T> gram;
    Part<T> shift;        // provisional means of the columns
    Part<double> sample;  // sums that they are computed from; then the offsets of the true means
    Part<double> sums;    // gram.sums
};

// From the Gram matrix to the solution.
template <class T>
struct FinishPlan {
    int64_t ldz = 0;  // right-hand sides in whole vectors of T
    int64_t ldk = 0;  // the same of double
    // Refinement's rows, cut as Gram's are.
    EvenCut pieces;

    Layout own_layout;
    Part<T> z, floor, inverse_diagonal, work;
    Part<double> solution, penalty;
    Part<T> saved;      // the matrix, if jitter may be added
    Part<double> sums;  // of refinement: high and low parts for each piece
    // Memory of a thread while it works on one of refinement's pieces.
    Layout piece_layout;
    Part<double> piece_work;
};

template <class T>
struct SolveNormalPlan {
    Layout layout;
    PackPlan<T> pack;
    GramPlan<T> gram;  // of all problems, or of the one that gets jitter
    Part<T> matrices;  // of all problems, where groups of columns fill them
    FinishPlan<T> finish;
};

template <class T>
struct SolveSpdPlan {
    const NormalKernels<T>* kernels = nullptr;
    Layout layout;
    PackPlan<T> pack;
    int64_t rows_padded = 0, ld = 0, ldz = 0;
    Layout own_layout;
    Part<T> matrix, floor, inverse_diagonal, z;
};

template <class T>
struct CholeskySolvePlan {
    const NormalKernels<T>* kernels = nullptr;
    Layout layout;
    PackPlan<T> pack;
    FixedCut columns;  // right-hand sides that one piece of work takes
    Layout own_layout;
    Part<T> inverse_diagonal, z;
    Part<T> copy;  // of the factor, where its rows are not contiguous
};

template <class T>
struct SolveNormalBackwardPlan {
    Layout layout;
    CholeskySolvePlan<T> solve;
    Part<T> adjoint;      // A⁻¹ grad
    bool packed = false;  // one problem in each vector lane
    FixedCut rows;        // else: that one piece of work takes
    Layout own_layout;
    Part<T> solution, work;
};

template <class T>
struct SolveSegmentsPlan {
    GramPlan<T> gram;  // of a problem in the primal form
    // Problems are taken to be offsets[b] + b · d units long, about their work in rows, and piece p has those that
    // begin in the units [p · units, (p + 1) · units).
    int64_t units = 1;
    int64_t pieces = 0;
    bool whitens = false;  // for the dual form
    int64_t ldz = 0;       // right-hand sides in whole vectors
    int64_t ldd = 0;       // features in whole vectors
    int64_t buffers = 0;   // pieces of long problems that are summed at a time

    Layout layout;
    Part<T> shared;                   // what all matrices have in common
    Part<double> sums;                // of pieces of long problems
    Part<T> inverse, inverse_turned;  // U⁻¹ and its transpose, of base + ridge = UᵀU
    Part<T> whitened;                 // XU⁻¹

    // Of the thread that works on a problem or a piece.
    Layout own_layout;
    Part<T> matrix, floor, inverse_diagonal, z;
    Part<T> scale;       // of the rows of a dual problem
    Part<T> v, w;        // of the piece's dual problems: UW, and W, a row for each right-hand side
    Part<int64_t> dual;  // which they are
};

template <class T>
GramEntryPlan<T> plan(const GramArgs<T>& args);
template <class T>
MomentsPlan<T> plan(const MomentsArgs<T>& args);
template <class T>
SolveNormalPlan<T> plan(const SolveNormalArgs<T>& args);
template <class T>
SolveSegmentsPlan<T> plan(const SolveSegmentsArgs<T>& args);
template <class T>
SolveNormalBackwardPlan<T> plan(const SolveNormalBackwardArgs<T>& args);
template <class T>
SolveSpdPlan<T> plan(const SolveSpdArgs<T>& args);
template <class T>
CholeskySolvePlan<T> plan(const CholeskySolveArgs<T>& args);

// `workspace` holds plan.layout.bytes().
template <class T>
Status run(const GramEntryPlan<T>& plan, const GramArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const MomentsPlan<T>& plan, const MomentsArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const SolveNormalPlan<T>& plan, const SolveNormalArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const SolveSegmentsPlan<T>& plan, const SolveSegmentsArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const SolveNormalBackwardPlan<T>& plan, const SolveNormalBackwardArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const SolveSpdPlan<T>& plan, const SolveSpdArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const CholeskySolvePlan<T>& plan, const CholeskySolveArgs<T>& args, const Workspace& workspace);

}  // namespace onestep

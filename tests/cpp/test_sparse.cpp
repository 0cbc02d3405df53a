// The tuned product with a sparse matrix against the plain loops, for every CPU target of this machine, in both types
// and both widths of indices, at every edge of vectors, serially and with threads. Built with AddressSanitizer and
// UndefinedBehaviorSanitizer by make test-cpp.
#include "sparse/sparse.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

template <class T, class Index>
struct Inputs {
    int64_t n, d;
    std::vector<Index> offsets = {0}, indices;
    std::vector<T> values;

    // Rows have from none to `most` elements, in any columns, which may come twice.
    Inputs(std::mt19937& random, int64_t n_, int64_t d_, int64_t most) : n(n_), d(d_) {
        std::uniform_real_distribution<double> uniform(-1.0, 1.0);
        for (int64_t r = 0; r < n; ++r) {
            const int64_t count = std::uniform_int_distribution<int64_t>(0, most)(random);
            for (int64_t e = 0; e < count; ++e) {
                indices.push_back(static_cast<Index>(std::uniform_int_distribution<int64_t>(0, d - 1)(random)));
                values.push_back(static_cast<T>(uniform(random)));
            }
            offsets.push_back(static_cast<Index>(indices.size()));
        }
    }

    SparseMultiplyArgs<T> args(int64_t k, const std::vector<T>& v, std::vector<T>& out) const {
        SparseMultiplyArgs<T> result;
        result.n = n;
        result.d = d;
        result.k = k;
        result.elements = static_cast<int64_t>(values.size());
        result.offsets = offsets.data();
        result.indices = indices.data();
        result.wide = sizeof(Index) == 8;
        result.values = values.data();
        result.v = v.data();
        result.out = out.data();
        return result;
    }
};

template <class T, class Index>
void test_case(std::mt19937& random, int64_t n, int64_t d, int64_t most, int64_t k) {
    const Inputs<T, Index> in(random, n, d, most);
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    std::vector<T> v(static_cast<size_t>(d * k));
    std::generate(v.begin(), v.end(), [&] { return static_cast<T>(uniform(random)); });
    auto run = [&](bool tuned) {
        std::vector<T> out(static_cast<size_t>(n * k), T(7));
        const SparseMultiplyArgs<T> args = in.args(k, v, out);
        if (tuned) {
            attempt("multiply", [&] { return sparse_multiply(args); });
        } else {
            check(reference::sparse_multiply(args) == Status::ok, "reference");
        }
        return out;
    };
    const std::string label = "n " + std::to_string(n) + ", d " + std::to_string(d) + ", k " + std::to_string(k) +
                              (sizeof(T) == 4 ? " f32" : " f64") + (sizeof(Index) == 4 ? ", 32 bits" : ", 64 bits");
    const std::vector<T> serial = run(true);
    check(difference(serial, run(false)) < (sizeof(T) == 4 ? 2e-5 : 1e-13), "product " + label);
    check(identical(with_threads([&] { return run(true); }), serial), "threads " + label);
}

template <class T>
void test_type() {
    std::mt19937 random(1);
    for (const int64_t k : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 80}) {
        test_case<T, int32_t>(random, 1, 1, 1, k);
        test_case<T, int32_t>(random, 70, 9, 5, k);
        test_case<T, int64_t>(random, 300, 500, 40, k);
    }
    test_case<T, int32_t>(random, 0, 3, 1, 4);
    // Enough work for several threads.
    test_case<T, int32_t>(random, 3000, 800, 60, 20);
}

// Some rows of a matrix: their offsets do not begin at 0, and the elements are those of all rows.
template <class T>
void test_part_of_the_rows() {
    std::mt19937 random(4);
    const Inputs<T, int32_t> in(random, 500, 40, 30);
    const std::vector<T> v(40 * 6, T(0.5));
    std::vector<T> whole(500 * 6), part(200 * 6);
    check(sparse_multiply(in.args(6, v, whole)) == Status::ok, "all rows");
    SparseMultiplyArgs<T> args = in.args(6, v, part);
    args.n = 200;
    args.offsets = in.offsets.data() + 150;
    for (const bool threads : {false, true}) {
        std::fill(part.begin(), part.end(), T(7));
        set_thread_count(threads ? three_threads : nullptr);
        check(sparse_multiply(args) == Status::ok, "a part of the rows");
        set_thread_count(nullptr);
        check(std::equal(part.begin(), part.end(), whole.begin() + 150 * 6), "rows of the part");
    }
}

template <class T>
void test_bad_indices() {
    std::mt19937 random(2);
    const Inputs<T, int32_t> good(random, 20, 6, 4);
    const std::vector<T> v(6 * 5, T(1));
    std::vector<T> out(20 * 5);
    auto status = [&](const Inputs<T, int32_t>& in) { return sparse_multiply(in.args(5, v, out)); };
    check(status(good) == Status::ok, "good indices");
    for (const int32_t index : {-1, 6, 2'000'000'000}) {
        Inputs<T, int32_t> bad = good;
        bad.indices[bad.indices.size() / 2] = index;
        check(status(bad) == Status::bad_index, "index " + std::to_string(index));
    }
    for (const int32_t offset : {-1, 2'000'000'000}) {
        for (const size_t row : {size_t{0}, size_t{9}, size_t{20}}) {
            Inputs<T, int32_t> bad = good;
            bad.offsets[row] = offset;
            check(status(bad) == Status::bad_index, "offset " + std::to_string(offset));
        }
    }
}

void test_faults() {
    trial = Trial::faults;
    std::mt19937 random(3);
    test_case<float, int32_t>(random, 3000, 800, 60, 5);
    test_case<double, int64_t>(random, 300, 80, 10, 70);
    trial = Trial::plain;
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"faults", test_faults, Where::first_target},
                        {"fp32", test_type<float>},
                        {"fp64", test_type<double>},
                        {"part_fp32", test_part_of_the_rows<float>},
                        {"part_fp64", test_part_of_the_rows<double>},
                        {"bad_indices_fp32", test_bad_indices<float>},
                        {"bad_indices_fp64", test_bad_indices<double>}},
                       Target::avx512);
}

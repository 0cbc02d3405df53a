// Rows of a perceptron through all layers and back, a block at a time; formulas in mlp.hpp. Activations lie as
// [row panel][unit][row], a row per lane, units padded to whole tiles.
#pragma once

#include "base/gemm-inl.hpp"
#include "base/work-inl.hpp"
#include "mlp/cpu/activations-inl.hpp"

namespace onestep::mlp::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Packed weights, layer by layer: W in tiles of rows for the forward pass, then in tiles of columns for the backward
// pass.
inline int64_t forward_size(const MlpLayer& layer) { return round_up_to(layer.outputs, kTileRows) * layer.inputs; }

inline int64_t back_size(const MlpLayer& layer) { return round_up_to(layer.inputs, kTileRows) * layer.outputs; }

inline int64_t mlp_packed_size(const MlpLayer* layers, int64_t count) {
    int64_t size = 0;
    for (int64_t l = 0; l < count; ++l) {
        size += forward_size(layers[l]) + back_size(layers[l]);
    }
    return size;
}

template <class T>
inline void mlp_pack(const MlpNetwork<T>& network, T* to) {
    for (int64_t l = 0; l < network.count; ++l) {
        const MlpLayer& layer = network.layers[l];
        const StridedRows<T> rows{network.parameters + layer.weight_at, layer.inputs};
        pack_rows<kTileRows, T>(rows, 0, layer.outputs, 1, 0, layer.inputs, to);
        to += forward_size(layer);
        pack_columns_of_rows<kTileRows, T>(rows, 0, layer.outputs, 1, 0, layer.inputs, to);
        to += back_size(layer);
    }
}

// A matrix over the rows of a block: unit u of row r is data[r / kPanel * panel + u * kPanel + r % kPanel].
template <class T>
struct Units {
    T* data;
    int64_t panel;

    static int64_t padded(int64_t units) { return round_up_to(units, kTileRows) * kPanel<T>; }
    T* at(int64_t q, int64_t unit) const { return data + q * panel + unit * kPanel<T>; }

    // Exchanges memory with `next`: its values are this one's now.
    void become(Units& next) {
        T* const free = data;
        *this = next;
        next.data = free;
    }
};

inline int64_t widest_layer(const MlpLayer* layers, int64_t count) {
    int64_t most = layers[0].inputs;
    for (int64_t l = 0; l < count; ++l) {
        most = maximum(most, layers[l].outputs);
    }
    return most;
}

// What a block holds, a part each: the activations of every layer, the targets, δ of two layers, and the Jacobian's
// rows of one panel, by rows.
template <class T>
inline int64_t mlp_work(const MlpLayer* layers, int64_t count, int64_t rows) {
    const int64_t panels = rows / kPanel<T>;
    const auto part = [&](int64_t units) { return Work<T>::rounded(panels * Units<T>::padded(units)); };
    const int64_t widest = widest_layer(layers, count);
    int64_t size = part(layers[0].inputs) + part(layers[count - 1].outputs);
    for (int64_t l = 0; l < count; ++l) {
        size += part(layers[l].outputs);
    }
    return size + 2 * part(widest) + 2 * Work<T>::rounded(Units<T>::padded(widest));
}

// One block of rows that passes through the layers.
template <class T>
struct Block {
    const MlpNetwork<T>& network;
    int64_t begin, rows, panels;
    Work<T> work;

    Block(const MlpNetwork<T>& network_, int64_t begin_, int64_t rows_, const WorkMemory<T>& memory)
        : network(network_), begin(begin_), rows(rows_), panels((rows_ + kPanel<T> - 1) / kPanel<T>), work(memory) {}

    const MlpLayer& layer(int64_t l) const { return network.layers[l]; }
    const MlpLayer& last() const { return network.layers[network.count - 1]; }

    Units<T> take(int64_t units) {
        const int64_t panel = Units<T>::padded(units);
        return {work.take(panels * panel), panel};
    }

    // The block's rows of a table, as units.
    Units<T> packed(const Matrix<const T>& table, int64_t units) {
        const Units<T> to = take(units);
        for (int64_t q = 0; q < panels; ++q) {
            pack_rows<kPanel<T>, T>(StridedRows<T>{table.data, table.row}, begin + q * kPanel<T>,
                                    minimum(kPanel<T>, rows - q * kPanel<T>), table.col, 0, units, to.at(q, 0));
        }
        return to;
    }

    // to = the packed tiles of a matrix times from, or to += with `add`.
    void multiply(const T* tiles, int64_t outputs, int64_t inputs, const Units<T>& from, const Units<T>& to,
                  bool add = false) const {
        const int64_t count = (outputs + kTileRows - 1) / kTileRows;
        multiply_panels<T>(count, panels, 1, inputs, LeftTiles<T>::packed(tiles, inputs), {from.data, from.panel, 0},
                           add, {to.data, kPanel<T>, to.panel, count * kTileRows, panels * kPanel<T>});
    }

    // apply(vector of unit u, u) for every vector of rows.
    template <class Apply>
    ONESTEP_INLINE void each(int64_t units, const Units<T>& values, const Apply& apply) const {
        for (int64_t q = 0; q < panels; ++q) {
            for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 4
                for (int64_t v = 0; v < kPanel<T>; v += kLanes<T>) {
                    apply(values.at(q, u) + v, q * values.panel + u * kPanel<T> + v, u);
                }
            }
        }
    }

    // a_l of every layer; activations[0] is x. `activations` has room for count + 1.
    void forward(Units<T>* activations) {
        activations[0] = packed(network.x, layer(0).inputs);
        const T* tiles = network.packed;
        for (int64_t l = 0; l < network.count; ++l) {
            const MlpLayer& now = layer(l);
            activations[l + 1] = take(now.outputs);
            multiply(tiles, now.outputs, now.inputs, activations[l], activations[l + 1]);
            const T* bias = network.parameters + now.bias_at();
            each(now.outputs, activations[l + 1], [&](T* at, int64_t, int64_t u) {
                const Vec<T> z = now.biased ? load<T>(at) + bias[u] : load<T>(at);
                store<T>(at, activate<T>(now.activation, z));
            });
            tiles += forward_size(now) + back_size(now);
        }
    }

    // ȧ of the last layer. `direction` is the network of v; tangent, next: memory for the widest layer each.
    Units<T> forward_tangent(const MlpNetwork<T>& direction, const Units<T>* activations, Units<T> tangent,
                             Units<T> next) const {
        const T* tiles = network.packed;
        const T* tangent_tiles = direction.packed;
        for (int64_t l = 0; l < network.count; ++l) {
            const MlpLayer& now = layer(l);
            next.panel = activations[l + 1].panel;
            multiply(tangent_tiles, now.outputs, now.inputs, activations[l], next);
            if (l > 0) {
                multiply(tiles, now.outputs, now.inputs, tangent, next, true);
            }
            const T* bias = direction.parameters + now.bias_at();
            each(now.outputs, next, [&](T* at, int64_t offset, int64_t u) {
                const Vec<T> z = now.biased ? load<T>(at) + bias[u] : load<T>(at);
                store<T>(at, z * slope<T>(now.activation, load<T>(activations[l + 1].data + offset)));
            });
            const int64_t size = forward_size(now) + back_size(now);
            tiles += size;
            tangent_tiles += size;
            tangent.become(next);
        }
        return tangent;
    }

    // to = δ of layer l − 1 from δ of layer l; `tiles` are layer l's for the backward pass.
    void step_back(int64_t l, const T* tiles, const Units<T>& activation, const Units<T>& delta,
                   const Units<T>& to) const {
        const MlpLayer& now = layer(l);
        multiply(tiles, now.inputs, now.outputs, delta, to);
        const MlpActivation before = layer(l - 1).activation;
        each(now.inputs, to, [&](T* at, int64_t offset, int64_t) {
            store<T>(at, load<T>(at) * slope<T>(before, load<T>(activation.data + offset)));
        });
    }

    // Where layer l's tiles for the backward pass start.
    const T* back_tiles(int64_t l) const {
        return network.packed + mlp_packed_size(network.layers, l) + forward_size(layer(l));
    }

    // Zeros in the rows of the last panel that lie beyond the block.
    void clear_padding(int64_t units, const Units<T>& values) const {
        const int64_t used = rows - (panels - 1) * kPanel<T>;
        for (int64_t u = 0; used < kPanel<T> && u < units; ++u) {
            for (int64_t r = used; r < kPanel<T>; ++r) {
                values.at(panels - 1, u)[r] = T(0);
            }
        }
    }
};

// to[i · ld + j] += Σ over the block's rows of left unit i times right unit j, i < M, j < N.
template <class T, int M, int N>
inline void add_products(int64_t panels, const Units<T>& left, int64_t i, const Units<T>& right, int64_t j, T* to,
                         int64_t ld) {
    Vec<T> acc[M][N] = {};
    for (int64_t q = 0; q < panels; ++q) {
        const T* a = left.at(q, i);
        const T* b = right.at(q, j);
        for (int64_t v = 0; v < kPanel<T>; v += kLanes<T>) {
            Vec<T> columns[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                columns[n] = load<T>(b + n * kPanel<T> + v);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const Vec<T> row = load<T>(a + m * kPanel<T> + v);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    acc[m][n] += row * columns[n];
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            to[(i + m) * ld + j + n] += sum_across<T>(acc[m][n]);
        }
    }
}

template <class T, int M>
inline void add_product_rows(int64_t panels, const Units<T>& left, int64_t i, const Units<T>& right, int64_t columns,
                             T* to) {
    int64_t j = 0;
    for (; j + 3 <= columns; j += 3) {
        add_products<T, M, 3>(panels, left, i, right, j, to, columns);
    }
    for (; j < columns; ++j) {
        add_products<T, M, 1>(panels, left, i, right, j, to, columns);
    }
}

// The gradient of one layer's parameters: δ aᵀ and δ summed over the rows.
template <class T>
inline void add_layer_gradient(const MlpLayer& layer, int64_t panels, const Units<T>& delta, const Units<T>& input,
                               T* gradient) {
    T* weight = gradient + layer.weight_at;
    int64_t u = 0;
    for (; u + 4 <= layer.outputs; u += 4) {
        add_product_rows<T, 4>(panels, delta, u, input, layer.inputs, weight);
    }
    for (; u < layer.outputs; ++u) {
        add_product_rows<T, 1>(panels, delta, u, input, layer.inputs, weight);
    }
    for (u = 0; layer.biased && u < layer.outputs; ++u) {
        Vec<T> sum{};
        for (int64_t q = 0; q < panels; ++q) {
            for (int64_t v = 0; v < kPanel<T>; v += kLanes<T>) {
                sum += load<T>(delta.at(q, u) + v);
            }
        }
        gradient[layer.bias_at() + u] += sum_across<T>(sum);
    }
}

// gradient += Jᵀ of the cotangent whose δ of the last layer is given; next: memory for the widest layer.
template <class T>
inline void add_backward(const Block<T>& block, const Units<T>* activations, Units<T> delta, Units<T> next,
                         T* gradient) {
    for (int64_t l = block.network.count - 1; l >= 0; --l) {
        add_layer_gradient<T>(block.layer(l), block.panels, delta, activations[l], gradient);
        if (l > 0) {
            next.panel = activations[l].panel;
            block.step_back(l, block.back_tiles(l), activations[l], delta, next);
            delta.become(next);
        }
    }
}

template <class T>
inline double mlp_gradient_rows(const MlpNetwork<T>& network, int64_t begin, int64_t rows, T* gradient,
                                const WorkMemory<T>& work) {
    Block<T> block(network, begin, rows, work);
    Units<T> activations[kMostMlpLayers + 1];
    block.forward(activations);
    const int64_t count = network.count;
    const MlpLayer& last = block.last();
    const Units<T> y = block.packed(network.y, last.outputs);
    const Units<T> outputs = activations[count];
    // y becomes the residuals.
    block.each(last.outputs, y,
               [&](T* at, int64_t offset, int64_t) { store<T>(at, load<T>(outputs.data + offset) - load<T>(at)); });
    block.clear_padding(last.outputs, y);
    double loss = 0.0;
    for (int64_t u = 0; u < last.outputs; ++u) {
        Vec<T> sum{};
        for (int64_t q = 0; q < block.panels; ++q) {
            for (int64_t v = 0; v < kPanel<T>; v += kLanes<T>) {
                const Vec<T> residual = load<T>(y.at(q, u) + v);
                sum += residual * residual;
            }
        }
        loss += static_cast<double>(sum_across<T>(sum));
    }
    if (gradient == nullptr) {
        return loss;
    }
    const int64_t widest = widest_layer(network.layers, count);
    Units<T> delta = block.take(widest);
    const Units<T> next = block.take(widest);
    delta.panel = y.panel;
    block.each(last.outputs, delta, [&](T* at, int64_t offset, int64_t) {
        const Vec<T> twice = load<T>(y.data + offset) * T(2);
        store<T>(at, twice * slope<T>(last.activation, load<T>(outputs.data + offset)));
    });
    add_backward<T>(block, activations, delta, next, gradient);
    return loss;
}

template <class T>
inline void mlp_product_rows(const MlpNetwork<T>& network, const MlpNetwork<T>& direction, int64_t begin, int64_t rows,
                             T* product, const WorkMemory<T>& work) {
    Block<T> block(network, begin, rows, work);
    Units<T> activations[kMostMlpLayers + 1];
    block.forward(activations);
    const MlpLayer& last = block.last();
    const int64_t widest = widest_layer(network.layers, network.count);
    const Units<T> first = block.take(widest);
    const Units<T> second = block.take(widest);
    const Units<T> delta = block.forward_tangent(direction, activations, first, second);
    const Units<T> outputs = activations[network.count];
    block.each(last.outputs, delta, [&](T* at, int64_t offset, int64_t) {
        const Vec<T> twice = load<T>(at) * T(2);
        store<T>(at, twice * slope<T>(last.activation, load<T>(outputs.data + offset)));
    });
    block.clear_padding(last.outputs, delta);
    add_backward<T>(block, activations, delta, delta.data == first.data ? second : first, product);
}

// δ of the last layer for one output, times `scale`.
template <class T>
inline void start_at_output(const Block<T>& block, const Units<T>& outputs, int64_t output, T scale,
                            const Units<T>& delta) {
    const MlpLayer& last = block.last();
    block.each(last.outputs, delta, [&](T* at, int64_t offset, int64_t u) {
        const Vec<T> of_output = slope<T>(last.activation, load<T>(outputs.data + offset)) * scale;
        store<T>(at, u == output ? of_output : Vec<T>{});
    });
    block.clear_padding(last.outputs, delta);
}

template <class T>
inline void square_units(const Block<T>& block, int64_t units, const Units<T>& values) {
    block.each(units, values, [](T* at, int64_t, int64_t) { store<T>(at, load<T>(at) * load<T>(at)); });
}

template <class T>
inline void mlp_diagonal_rows(const MlpNetwork<T>& network, int64_t begin, int64_t rows, T* diagonal,
                              const WorkMemory<T>& work) {
    Block<T> block(network, begin, rows, work);
    Units<T> activations[kMostMlpLayers + 1];
    const int64_t count = network.count;
    const int64_t widest = widest_layer(network.layers, count);
    for (int64_t output = 0; output < block.last().outputs; ++output) {
        // Squared in place.
        block.work = Work<T>(work);
        block.forward(activations);
        Units<T> delta = block.take(widest);
        Units<T> next = block.take(widest);
        delta.panel = activations[count].panel;
        start_at_output<T>(block, activations[count], output, square_root(T(2)), delta);
        for (int64_t l = count - 1; l >= 0; --l) {
            const MlpLayer& layer = block.layer(l);
            next.panel = activations[l].panel;
            if (l > 0) {
                block.step_back(l, block.back_tiles(l), activations[l], delta, next);
            }
            square_units<T>(block, layer.outputs, delta);
            square_units<T>(block, layer.inputs, activations[l]);
            add_layer_gradient<T>(layer, block.panels, delta, activations[l], diagonal);
            delta.become(next);
        }
    }
}

// Panel q of `units` by rows: to[row][unit].
template <class T>
inline void transpose_panel(int64_t units, int64_t rows, const T* from, T* to) {
    for (int64_t u = 0; u < units; ++u) {
        for (int64_t r = 0; r < rows; ++r) {
            to[r * units + u] = from[u * kPanel<T> + r];
        }
    }
}

template <class T>
inline void mlp_jacobian_rows(const MlpNetwork<T>& network, int64_t begin, int64_t rows, T scale, T* jacobian,
                              const WorkMemory<T>& work) {
    Block<T> block(network, begin, rows, work);
    Units<T> activations[kMostMlpLayers + 1];
    block.forward(activations);
    const int64_t count = network.count;
    const MlpLayer& last = block.last();
    const int64_t size = last.end();
    const int64_t widest = widest_layer(network.layers, count);
    const Units<T> first = block.take(widest);
    const Units<T> second = block.take(widest);
    T* delta_rows = block.work.take(Units<T>::padded(widest));
    T* input_rows = block.work.take(Units<T>::padded(widest));
    for (int64_t output = 0; output < last.outputs; ++output) {
        Units<T> delta = first;
        Units<T> next = second;
        delta.panel = activations[count].panel;
        start_at_output<T>(block, activations[count], output, scale, delta);
        for (int64_t l = count - 1; l >= 0; --l) {
            const MlpLayer& layer = block.layer(l);
            for (int64_t q = 0; q < block.panels; ++q) {
                const int64_t used = minimum(kPanel<T>, rows - q * kPanel<T>);
                transpose_panel<T>(layer.outputs, used, delta.at(q, 0), delta_rows);
                transpose_panel<T>(layer.inputs, used, activations[l].at(q, 0), input_rows);
                for (int64_t r = 0; r < used; ++r) {
                    T* row = jacobian + ((begin + q * kPanel<T> + r) * last.outputs + output) * size;
                    const T* of_row = delta_rows + r * layer.outputs;
                    const T* input = input_rows + r * layer.inputs;
                    for (int64_t u = 0; u < layer.outputs; ++u) {
                        T* to = row + layer.weight_at + u * layer.inputs;
                        for (int64_t i = 0; i < layer.inputs; ++i) {
                            to[i] = of_row[u] * input[i];
                        }
                    }
                    if (layer.biased) {
                        __builtin_memcpy(row + layer.bias_at(), of_row, static_cast<size_t>(layer.outputs) * sizeof(T));
                    }
                }
            }
            if (l > 0) {
                next.panel = activations[l].panel;
                block.step_back(l, block.back_tiles(l), activations[l], delta, next);
                delta.become(next);
            }
        }
    }
}

}  // namespace onestep::mlp::ONESTEP_NS

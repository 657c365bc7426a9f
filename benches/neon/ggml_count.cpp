// ggml's matmul, `reps` times on one thread, for counting its instructions: TYPE ROWS COLUMNS TOKENS REPS repacked|plain.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

int main(int n, char **args) {
    if (n != 7) return fprintf(stderr, "usage: %s TYPE ROWS COLUMNS TOKENS REPS repacked|plain\n", args[0]), 1;
    ggml_type type = GGML_TYPE_COUNT;
    for (int t = 0; t < GGML_TYPE_COUNT; t++)
        if (ggml_type_name(ggml_type(t)) && !strcasecmp(ggml_type_name(ggml_type(t)), args[1])) type = ggml_type(t);
    const long rows = atol(args[2]), columns = atol(args[3]), tokens = atol(args[4]), reps = atol(args[5]);
    const bool repacked = !strcmp(args[6], "repacked");

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    ggml_backend_buffer_type_t kind = ggml_backend_cpu_buffer_type();
    if (repacked) {
        ggml_backend_dev_t device = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        auto extra = (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
        ggml_backend_buffer_type_t *all = extra(device);
        if (!all || !*all) return fprintf(stderr, "no repacking here\n"), 1;
        kind = *all;
    }
    ggml_context *held = ggml_init({1 << 20, nullptr, true}), *graph_of = ggml_init({1 << 20, nullptr, true});
    ggml_tensor *w = ggml_new_tensor_2d(held, type, columns, rows);
    ggml_backend_alloc_ctx_tensors_from_buft(held, kind);
    std::vector<float> y(tokens * columns);
    unsigned state = 1;
    for (auto &v : y) state = state * 1664525u + 1013904223u, v = int(state >> 8) / 8388608.0f - 1.0f;
    // Any weights will do.
    std::vector<char> bytes(ggml_nbytes(w), 0x11);
    ggml_backend_tensor_set(w, bytes.data(), 0, bytes.size());

    ggml_context *inputs = ggml_init({1 << 20, nullptr, true});
    ggml_tensor *in = ggml_new_tensor_2d(inputs, GGML_TYPE_F32, columns, tokens);
    ggml_backend_alloc_ctx_tensors_from_buft(inputs, ggml_backend_cpu_buffer_type());
    ggml_backend_tensor_set(in, y.data(), 0, y.size() * 4);
    ggml_cgraph *graph = ggml_new_graph(graph_of);
    for (long i = 0; i < reps; i++) ggml_build_forward_expand(graph, ggml_mul_mat(graph_of, w, in));
    ggml_backend_alloc_ctx_tensors_from_buft(graph_of, ggml_backend_cpu_buffer_type());
    return ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS ? 0 : 1;
}

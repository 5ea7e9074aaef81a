/* SPDX-License-Identifier: Apache-2.0 */
/* Selects by the C interface. Every query asks for one axis, along which key s has the value
 * 7919 s mod KEYS, so that the best keys are known, and checked. */
#include <misa/misa.h>
#include <stdio.h>
#include <stdlib.h>

enum { QUERIES = 4, HEADS = 64, DIM = 128, KEYS = 9000, TOP_K = 2048 };

static int value(int position) { return position * 7919 % KEYS; }

/* Whether the row has TOP_K positions below `seen`, ascending, and none that is left out is better.
 */
static int is_best(const int32_t* row, int seen) {
  int worst_selected = KEYS, best_left = -1, next = 0;
  for (int s = 0; s < seen; ++s) {
    if (next < TOP_K && row[next] == s) {
      worst_selected = value(s) < worst_selected ? value(s) : worst_selected;
      ++next;
    } else {
      best_left = value(s) > best_left ? value(s) : best_left;
    }
  }
  return next == TOP_K && worst_selected > best_left;
}

int main(void) {
  static float q[QUERIES * HEADS * DIM], w[QUERIES * HEADS], k[KEYS * DIM];
  static int32_t ks[QUERIES], ke[QUERIES], indices[QUERIES * TOP_K];
  for (int i = 0; i < QUERIES * HEADS; ++i) {
    q[i * DIM] = 1;
    w[i] = 0.01F;
  }
  for (int s = 0; s < KEYS; ++s) {
    k[s * DIM] = (float)value(s);
  }
  for (int t = 0; t < QUERIES; ++t) {
    ke[t] = KEYS - QUERIES + 1 + t;
  }

  const misa_shape shape = {QUERIES, HEADS, DIM, KEYS, MISA_F32, MISA_F32};
  const misa_queries queries = {.data = q, .tokens = QUERIES, .heads = HEADS, .dim = DIM};
  const misa_weights weights = {.data = w, .tokens = QUERIES, .heads = HEADS};
  const misa_ragged_keys keys = {.data = k,
                                 .tokens = KEYS,
                                 .dim = DIM,
                                 .starts = ks,
                                 .start_count = QUERIES,
                                 .ends = ke,
                                 .end_count = QUERIES};
  const misa_selection out = {.indices = indices, .index_count = QUERIES * TOP_K};

  misa_context* context = NULL; /* the fastest backend of this machine */
  misa_plan* plan = NULL;
  void* workspace = NULL;
  size_t bytes = 0;
  misa_config config;
  misa_status status = misa_context_create(NULL, &context);
  if (status == MISA_OK) {
    status = misa_config_by_name("misa", &config);
  }
  if (status == MISA_OK) {
    config.top_k = TOP_K;
    config.heads = 8;
    config.ordered = 1;
    status = misa_plan_create(context, &config, &shape, &plan);
  }
  if (status == MISA_OK) {
    status = misa_plan_workspace_bytes(plan, &bytes);
  }
  if (status == MISA_OK) {
    workspace = aligned_alloc(64, (bytes + 63) / 64 * 64); /* no workspace is an error of the run */
    status = misa_run_ragged(plan, &queries, &weights, &keys, &out, workspace, bytes);
  }
  if (status != MISA_OK) {
    fprintf(stderr, "%s\n", misa_last_error());
  }
  free(workspace);
  misa_plan_destroy(plan);
  misa_context_destroy(context);

  int failed = status != MISA_OK;
  for (int t = 0; t < QUERIES && !failed; ++t) {
    const int32_t* row = indices + t * TOP_K;
    printf("query %d attends to positions %d ... %d\n", t, (int)row[0], (int)row[TOP_K - 1]);
    failed = !is_best(row, ke[t]);
    if (failed) {
      fprintf(stderr, "query %d: expected the keys of the largest values\n", t);
    }
  }
  return failed;
}

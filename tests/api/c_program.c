/* SPDX-License-Identifier: Apache-2.0 */
/* The C interface as a C99 program uses it: two one-head queries over three keys that lie along
 * three axes. Returns 0, or the line that failed. */
#include <string.h>

#include "misa/misa.h"

#define CHECK(condition) \
  if (!(condition))      \
  return __LINE__

int misa_c_program(void);

int misa_c_program(void) {
  static float q[2 * 64];
  static float w[2] = {1, 1};
  static float k[3 * 64];
  static const int32_t ks[2] = {0, 0};
  static const int32_t ke[2] = {3, 3};
  int32_t indices[4] = {0};
  float scores[4] = {0};
  static const int32_t expected[4] = {1, 2, 0, 1};
  misa_context_options options = {"reference", 1, 0};
  misa_context* context = NULL;
  misa_plan* plan = NULL;
  misa_config config;
  misa_shape shape = {2, 1, 64, 3, MISA_F32, MISA_F32};
  misa_queries queries = {q, MISA_F32, 2, 1, 64, 0, 0};
  misa_weights weights = {w, 2, 1, 0};
  misa_ragged_keys keys = {k, MISA_F32, 3, 64, 0, NULL, ks, 2, ke, 2};
  misa_selection out = {indices, 4, scores, 4, NULL, 0, NULL, 0, 0, 0, 0, NULL, 0};
  size_t bytes = 1;

  q[0] = 1, q[1] = 2, q[2] = 3;
  q[64] = 3, q[65] = 2;
  k[0] = k[65] = k[130] = 1;

  CHECK(misa_context_create(&options, &context) == MISA_OK);
  CHECK(misa_config_by_name("dsa", &config) == MISA_OK);
  config.top_k = 2;
  CHECK(misa_plan_create(context, &config, &shape, &plan) == MISA_OK);
  misa_context_destroy(context); /* the plan keeps what it needs */
  CHECK(misa_plan_workspace_bytes(plan, &bytes) == MISA_OK);
  CHECK(bytes == 0); /* the reference needs none */
  CHECK(misa_run_ragged(plan, &queries, &weights, &keys, &out, NULL, 0) == MISA_OK);
  CHECK(memcmp(indices, expected, sizeof indices) == 0);
  CHECK(scores[0] == 2 && scores[1] == 3 && scores[2] == 3 && scores[3] == 2);

  keys.tokens = 2;
  CHECK(misa_run_ragged(plan, &queries, &weights, &keys, &out, NULL, 0) == MISA_INVALID_ARGUMENT);
  CHECK(strcmp(misa_last_error(), "ke[0]: expected 0 to L = 2, got 3") == 0);
  misa_plan_destroy(plan);
  return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The C interface from C: a cache is filled, a context made, and a mistake comes back as a
 * message. */
#include <misa/misa.h>
#include <string.h>

int main(void) {
  static float k[64];
  static uint8_t data[64 * (64 + 4)];
  const int64_t slot = 0;
  misa_cache_span cache = {data, 1, 64, 0, NULL};
  misa_new_keys keys = {k, MISA_F32, 1, 64, 0};
  misa_context* context = NULL;
  if (misa_cache_append(&cache, &keys, &slot, 1, MISA_SCALE_F32) != MISA_OK ||
      misa_context_create(NULL, &context) != MISA_OK) {
    return 1;
  }
  misa_context_destroy(context);
  keys.dim = 96;
  return misa_cache_append(&cache, &keys, &slot, 1, MISA_SCALE_F32) == MISA_INVALID_ARGUMENT &&
                 strstr(misa_last_error(), "96") != NULL
             ? 0
             : 1;
}

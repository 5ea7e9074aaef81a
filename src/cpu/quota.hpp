// SPDX-License-Identifier: Apache-2.0
// How much processor time the process's control groups allow.
#pragma once

#include <filesystem>
#include <optional>

namespace misa {

// Processors' worth of time a second, rounded up, that the CFS quotas of the process's control
// groups (versions 1 and 2) and of the groups above them allow; none where no quota is set or none
// can be read. `root` is the folder under which proc/ and sys/ stand.
std::optional<int> cpu_quota(const std::filesystem::path& root = "/");

}  // namespace misa

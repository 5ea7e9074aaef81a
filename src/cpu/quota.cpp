// SPDX-License-Identifier: Apache-2.0
#include "cpu/quota.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace misa {
namespace {

namespace fs = std::filesystem;

// A hierarchy of control groups that limits processor time.
struct Hierarchy {
  fs::path mount;  // where it is mounted, e.g. "/sys/fs/cgroup"
  fs::path group;  // the process's group, below the mount
  bool version2;
};

bool lists(const std::string& list, const std::string& word) {
  std::istringstream words(list);
  for (std::string item; std::getline(words, item, ',');) {
    if (item == word) {
      return true;
    }
  }
  return false;
}

// The process's group in a hierarchy, from the lines "id:controllers:path" of proc/self/cgroup;
// empty if it is in none.
std::string group_of(const fs::path& root, bool version2) {
  std::ifstream lines(root / "proc/self/cgroup");
  for (std::string line; std::getline(lines, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version2 ? controllers.empty() : lists(controllers, "cpu")) {
      return line.substr(second + 1);
    }
  }
  return {};
}

// From the lines of proc/self/mountinfo:
//   id parent device root mount-point options [optional fields] - type source super-options
std::vector<Hierarchy> hierarchies(const fs::path& root) {
  std::vector<Hierarchy> result;
  std::ifstream lines(root / "proc/self/mountinfo");
  for (std::string line; std::getline(lines, line);) {
    const std::size_t separator = line.find(" - ");
    if (separator == std::string::npos) {
      continue;
    }
    std::istringstream fields(line);
    std::istringstream source_fields(line.substr(separator + 3));
    std::string skipped;
    std::string mounted;  // the group that the mount point shows
    std::string point;
    std::string type;
    std::string options;
    fields >> skipped >> skipped >> skipped >> mounted >> point;
    source_fields >> type >> skipped >> options;
    const bool version2 = type == "cgroup2";
    if (!version2 && !(type == "cgroup" && lists(options, "cpu"))) {
      continue;
    }
    const std::string group = group_of(root, version2);
    if (group.empty()) {
      continue;
    }
    // In a container the process's group may lie outside the mount; the mounted group is used then.
    const fs::path relative = fs::path(group).lexically_relative(mounted);
    const bool outside = relative.empty() || *relative.begin() == "..";
    result.push_back(
        {root / fs::path(point).relative_path(), outside ? fs::path(".") : relative, version2});
  }
  return result;
}

// How many processors' time one group grants; infinite without a quota.
double processors(const fs::path& group, bool version2) {
  std::string quota = "max";
  double period = 0;
  if (version2) {
    std::ifstream(group / "cpu.max") >> quota >> period;
  } else {
    std::ifstream(group / "cpu.cfs_quota_us") >> quota;
    std::ifstream(group / "cpu.cfs_period_us") >> period;
  }
  const double granted = std::strtod(quota.c_str(), nullptr);  // 0 for "max", -1 for none
  return granted > 0 && period > 0 ? granted / period : std::numeric_limits<double>::infinity();
}

}  // namespace

std::optional<int> cpu_quota(const fs::path& root) {
  double least = std::numeric_limits<double>::infinity();
  for (const Hierarchy& hierarchy : hierarchies(root)) {
    fs::path group = hierarchy.mount;
    least = std::min(least, processors(group, hierarchy.version2));
    for (const fs::path& part : hierarchy.group) {
      group /= part;
      least = std::min(least, processors(group, hierarchy.version2));
    }
  }
  if (!(least < std::numeric_limits<int>::max())) {
    return std::nullopt;
  }
  return std::max(1, static_cast<int>(std::ceil(least)));
}

}  // namespace misa

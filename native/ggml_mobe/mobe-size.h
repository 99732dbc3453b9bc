// A size as the tools' options take it: bytes, or with a K, M or G behind.

#pragma once

#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>

inline size_t mobe_parse_size(const std::string & text) {
    static const std::string units = "KMG";
    size_t end = 0;
    double number = 0.0;
    try {
        number = std::stod(text, &end);
    } catch (const std::exception &) {
        end = std::string::npos;
    }
    const size_t unit = end < text.size() ? units.find(text[end]) : std::string::npos;
    if (unit != std::string::npos) {
        number *= std::pow(1024.0, unit + 1.0);
        end++;
    }
    if (end != text.size() || !(number >= 0.0 && number < 1e18)) {
        throw std::invalid_argument("'" + text + "' is no size: expected bytes, or a number with K, M or G, as 512M");
    }
    return (size_t) number;
}

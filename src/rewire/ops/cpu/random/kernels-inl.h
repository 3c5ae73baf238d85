// The vector kernels that draw numbers; compiled once per instruction set by random/kernels.cpp.

namespace {

#include "simd/vectors-inl.h"

#include "random/draw-inl.h"

#include "random/langevin-inl.h"

}  // namespace

const RandomKernels kRandom = {
    {{langevin<float, int32_t>, langevin<float, int64_t>},
     {langevin<double, int32_t>, langevin<double, int64_t>}},
    random_bits,
    position_signs,
    list_bits,
    {add_normals<float>, add_normals<double>},
};

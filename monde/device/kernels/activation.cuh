// The non-linearities; kinds are numbered as hostcompute.ActivationKind lists them.

__device__ float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }
// NaN fails both comparisons and stays.
__device__ float at_most(float v, float limit) { return v > limit ? limit : v; }
__device__ float clamp(float v, float limit) { return v < -limit ? -limit : at_most(v, limit); }

__device__ float activate(const Layer* layer, float gate, float up) {
  const float limit = float(layer->limit), alpha = float(layer->alpha);
  const bool gated = layer->gated;
  float h;
  switch (int(layer->activation)) {
    case KIND_SILU:
      h = gate * sigmoid(gate);
      break;
    case KIND_GELU_TANH: {
      const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
      h = 0.5f * gate * (1.f + tanhf(inner));
      break;
    }
    case KIND_GELU_ERF:
      h = 0.5f * gate * erfcf(-gate * 0.70710678118f);
      break;
    case KIND_RELU:
      h = gate < 0.f ? 0.f : gate;  // keeps NaN
      break;
    case KIND_RELU2:
      h = gate < 0.f ? 0.f : gate * gate;
      break;
    case KIND_SWIGLU_CLAMP:
      gate = at_most(gate, limit);
      h = gate * sigmoid(gate);
      up = clamp(up, limit);
      break;
    case KIND_SWIGLU_ALPHA:
      gate = at_most(gate, limit);
      h = gate * sigmoid(alpha * gate);
      up = clamp(up, limit) + 1.f;
      break;
    case KIND_SWIGLU_POST_CLAMP:
      h = at_most(gate * sigmoid(gate), limit);
      up = clamp(up, limit);
      break;
    default:  // KIND_SWIGLU_SOFTCAP
      h = alpha * tanhf(gate / alpha) * sigmoid(gate);
      up = limit * tanhf(up / limit);
  }
  return gated ? h * up : h;
}

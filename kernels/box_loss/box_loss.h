// One minus the overlap of two boxes, and its derivative by the first of them, for the processor and for the GPU.
#pragma once

#include "../vecmath.h"

namespace visdet::boxes {

enum Overlap : int64_t { kIoU = 0, kGIoU = 1, kDIoU = 2, kCIoU = 3 };

template <class T> VISDET_BOTH inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> VISDET_BOTH inline T larger(T a, T b) { return a > b ? a : b; }
// Which of two numbers a minimum or a maximum follows: the one that wins, both by half where they are equal.
template <class T> VISDET_BOTH inline T wins(T a, T b) { return a < b ? T(1) : a == b ? T(0.5) : T(0); }
template <class T> VISDET_BOTH inline T if_not(bool below) { return below ? T(0) : T(1); }

// Boxes a and b, four columns each. One axis at a time: [0] and [2] are x, [1] and [3] are y.
template <int64_t kind, bool with_grad, class T>
VISDET_BOTH inline void pair_loss(T a0, T a1, T a2, T a3, T b0, T b1, T b2, T b3, T& loss, T& g0, T& g1, T& g2, T& g3) {
  constexpr T eps = T(1e-9), pi = T(3.14159265358979323846);
  using vec::atan_ratio;
  const T iw = smaller(a2, b2) - larger(a0, b0), ih = smaller(a3, b3) - larger(a1, b1), w = larger(iw, T(0)), h = larger(ih, T(0));
  const T aw = a2 - a0, ah = a3 - a1, bw = b2 - b0, bh = b3 - b1, awc = larger(aw, T(0)), ahc = larger(ah, T(0));
  const T inter = w * h, uni = (awc * ahc + larger(bw, T(0)) * larger(bh, T(0))) - inter, unic = larger(uni, eps), iou = inter / unic;
  // The smallest box around both
  const T W = larger(a2, b2) - smaller(a0, b0), H = larger(a3, b3) - smaller(a1, b1);
  const T hull = W * H, hullc = larger(hull, eps), bare = (hull - uni) / hullc;
  // Centres, doubled, and the diagonal
  const T dx = a0 + a2 - b0 - b2, dy = a1 + a3 - b1 - b3, diag = T(4) * (W * W + H * H), diagc = larger(diag, eps), apart = (dx * dx + dy * dy) / diagc;
  // Angles of the diagonals; the factor alpha counts as a constant
  const T ahe = larger(ah, eps);
  T turn = 0, alpha = 0;
  if constexpr (kind == kCIoU) {
    turn = atan_ratio(aw, ahe) - atan_ratio(bw, larger(bh, eps));
    const T v = T(4) / (pi * pi) * turn * turn;
    alpha = v / larger(T(1) - iou + v, eps);
    loss = v * alpha;
  } else loss = 0;
  // Not a finite number anywhere: neither is the loss
  const T poison = T(0) * (a0 + a1 + a2 + a3 + b0 + b1 + b2 + b3);
  loss += T(1) - iou + poison;
  if constexpr (kind == kGIoU) loss += bare;
  if constexpr (kind == kDIoU || kind == kCIoU) loss += apart;
  if constexpr (with_grad) {
    const T onw = if_not<T>(iw <= T(0)), onh = if_not<T>(ih <= T(0)), onaw = if_not<T>(aw <= T(0)), onah = if_not<T>(ah <= T(0));
    const T uon = if_not<T>(uni <= eps);
    // by inter and union: d iou = (di - iou * du) / union, du = darea - di
    const T i0 = -h * onw * wins(b0, a0), i1 = -w * onh * wins(b1, a1), i2 = h * onw * wins(a2, b2), i3 = w * onh * wins(a3, b3);
    const T u0 = -onaw * ahc - i0, u1 = -onah * awc - i1, u2 = onaw * ahc - i2, u3 = onah * awc - i3, iu = iou * uon, ru = T(1) / unic;
    g0 = poison - (i0 - iu * u0) * ru, g1 = poison - (i1 - iu * u1) * ru, g2 = poison - (i2 - iu * u2) * ru, g3 = poison - (i3 - iu * u3) * ru;
    const T W0 = -wins(a0, b0), H1 = -wins(a1, b1), W2 = wins(b2, a2), H3 = wins(b3, a3);
    if constexpr (kind == kGIoU) {
      const T keep = T(1) - bare * if_not<T>(hull <= eps), rh = T(1) / hullc;
      g0 += (H * W0 * keep - u0) * rh, g1 += (W * H1 * keep - u1) * rh, g2 += (H * W2 * keep - u2) * rh, g3 += (W * H3 * keep - u3) * rh;
    }
    if constexpr (kind == kDIoU || kind == kCIoU) {
      const T far = T(4) * apart * if_not<T>(diag <= eps), rd = T(2) / diagc;
      g0 += (dx - far * W * W0) * rd, g1 += (dy - far * H * H1) * rd, g2 += (dx - far * W * W2) * rd, g3 += (dy - far * H * H3) * rd;
    }
    if constexpr (kind == kCIoU) {
      const T m = alpha * T(8) / (pi * pi) * turn / (aw * aw + ahe * ahe), mw = m * ahe, mh = -m * aw * if_not<T>(ah <= eps);
      g0 -= mw, g1 -= mh, g2 += mw, g3 += mh;
    }
  }
}

}  // namespace visdet::boxes

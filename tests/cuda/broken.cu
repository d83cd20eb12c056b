extern "C" __global__ void __launch_bounds__(128) reversed(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) float room[128];
  room[((int)threadIdx.x)] = x[((int)threadIdx.x)];
  __syncthreads();
  y[((int)threadIdx.x)] = room[(127 - ((int)threadIdx.x))];
}

extern "C" __global__ void __launch_bounds__(128) no_barrier(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) float room[128];
  room[((int)threadIdx.x)] = x[((int)threadIdx.x)];
  y[((int)threadIdx.x)] = room[(127 - ((int)threadIdx.x))];
}

extern "C" __global__ void __launch_bounds__(128) no_second_barrier(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) float room[128];
  float sum = 0.000000e+00f;
  for (int i = 0; i < 3; ++i) {
    room[((int)threadIdx.x)] = x[((int)threadIdx.x)] + (float)i;
    __syncthreads();
    sum = sum + room[(127 - ((int)threadIdx.x))] * (float)(i + 1);
  }
  y[((int)threadIdx.x)] = sum;
}

extern "C" __global__ void __launch_bounds__(128) unwritten(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) float room[128];
  if (((int)threadIdx.x) < 100) {
    room[((int)threadIdx.x)] = x[((int)threadIdx.x)];
  }
  __syncthreads();
  y[((int)threadIdx.x)] = room[((int)threadIdx.x)];
}

extern "C" __global__ void __launch_bounds__(128) half_the_block_waits(float* __restrict__ x, float* __restrict__ y) {
  y[((int)threadIdx.x)] = x[((int)threadIdx.x)];
  if (((int)threadIdx.x) < 64) {
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(128) two_places(float* __restrict__ x, float* __restrict__ y) {
  if (((int)threadIdx.x) < 64) {
    __syncthreads();
  } else {
    y[((int)threadIdx.x)] = x[((int)threadIdx.x)];
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(128) half_the_warp_waits(float* __restrict__ x, float* __restrict__ y) {
  if (((int)threadIdx.x) % 32 < 16) {
    y[((int)threadIdx.x)] = __shfl_xor_sync(0xffffffffu, x[((int)threadIdx.x)], 1, 32);
  }
}

extern "C" __global__ void __launch_bounds__(128) misaligned_load(float* __restrict__ x, float* __restrict__ y) {
  if (((int)threadIdx.x) < 8) {
    float4 v = *(float4*)(x + ((((int)threadIdx.x) * 4) + 1));
    y[((int)threadIdx.x)] = v.x;
  }
}

extern "C" __global__ void __launch_bounds__(128) misaligned_store(float* __restrict__ x, float* __restrict__ y) {
  if (((int)threadIdx.x) < 8) {
    *(float2*)(y + ((((int)threadIdx.x) * 2) + 1)) = make_float2(x[0], x[1]);
  }
}

extern "C" __global__ void __launch_bounds__(128) beyond_shared(float* __restrict__ x, float* __restrict__ y) {
  __shared__ alignas(64) float room[128];
  room[(((int)threadIdx.x) + 1)] = x[((int)threadIdx.x)];
  y[((int)threadIdx.x)] = 0.000000e+00f;
}

extern "C" __global__ void __launch_bounds__(128) beyond_local(float* __restrict__ x, float* __restrict__ y) {
  float sums[8];
  for (int i = 0; i < 8; ++i) {
    sums[(i + (((int)threadIdx.x) / 127))] = x[i];
  }
  y[((int)threadIdx.x)] = sums[3];
}

extern "C" __global__ void __launch_bounds__(128) behind_the_output(float* __restrict__ x, float* __restrict__ y) {
  y[(((int)threadIdx.x) + 1)] = x[((int)threadIdx.x)];
}

extern "C" __global__ void __launch_bounds__(128) far_behind_the_input(float* __restrict__ x, float* __restrict__ y) {
  y[((int)threadIdx.x)] = x[(((int)threadIdx.x) * 64)];
}

extern "C" __global__ void __launch_bounds__(128) beyond_the_launch(float* __restrict__ x, float* __restrict__ y) {
  ((float*)sparsec_room)[(((int)threadIdx.x) + 1)] = x[((int)threadIdx.x)];
  __syncthreads();
  y[((int)threadIdx.x)] = ((float*)sparsec_room)[((int)threadIdx.x)];
}

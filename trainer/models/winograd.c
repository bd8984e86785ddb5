/* Two TensorFlow operations for CPUs: the layers of the CNN from the image to the dropout after the
   pooling, fused, and their gradient. trainer/models/fast_step.py calls them.

   The second convolution is three quarters of the network's arithmetic. It is computed by Winograd's
   minimal filtering F(2x2, 3x3) (Lavin and Gray, 2015, https://arxiv.org/abs/1509.09308): a tile of
   4 by 4 inputs gives 2 by 2 outputs with 16 multiplications a pair of channels instead of 36. Such
   a tile of outputs is one window of the pooling, so bias, pooling, ReLU and dropout are applied
   while it is in registers, and one byte for each pooled value stores which of the four outputs its
   gradient goes to. The backward pass is the derivative of the same algorithm, so the transformed
   tiles serve both gradients. A thread works on one image at a time, in its core's own cache.

   Gradients are summed over groups of GROUP images, and the groups' sums are added in their order, so
   that the bits do not depend on the number of threads.

   TensorFlow's C API is looked up at run time, so neither TensorFlow nor Python is needed to compile
   this, and one binary serves all their versions. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SIDE = 28,   /* of an image */
    SIDE1 = 26,  /* of the first convolution's output */
    TILES = 12,  /* of 2 by 2 of the second's, a side; and so the side of the pooling's output */
    C1 = 32,     /* channels of the first convolution */
    C2 = 64,     /* and of the second */
    STRIP = 24,  /* tiles at a time: their intermediate values fit into a cache of 512 KB */
    GROUP = 8,   /* images whose gradients are summed by one thread */
    NOWHERE = 4, /* the code of a pooled value without a gradient: not positive, or dropped */
    MOST_THREADS = 256,
};

typedef struct {
    int64_t images;
    const void *x;                /* [images][SIDE][SIDE] */
    const void *kernel1, *bias1;  /* [3][3][1][C1], [C1] */
    const void *kernel2, *bias2;  /* [3][3][C1][C2], [C2] */
    const unsigned char *random;  /* [images][TILES][TILES][C2], or NULL without dropout */
    int drop;                     /* 256 times the dropout rate: random bytes below it drop */
    double scale;                 /* 1 / (1 - dropout rate) */
    unsigned char *code;          /* [images][TILES][TILES][C2] */
    void *out;                    /* the same, pooled */
    const void *gradient;         /* of out */
    void *u, *u_transposed;       /* kernel2, transformed: [16][C1][C2], [16][C2][C1] */
    void *sums;                   /* [groups], each the gradients of u, bias2, kernel1, bias1 */
} Work;

enum {
    U = 16 * C1 * C2,
    SUMS = U + C2 + 9 * C1 + C1, /* scalars in a group's sums */
};

typedef struct {
    size_t scalar, scratch; /* bytes */
    void (*prepare)(const Work *);
    void (*forward)(const Work *, void *scratch, int64_t image);
    void (*backward)(const Work *, void *scratch, int64_t image, void *sums);
    void (*finish)(const Work *, int64_t groups, void *kernel1, void *bias1, void *kernel2,
                   void *bias2);
} Kernels;

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__)
#define SCALAR float
#define INDEX int32_t
#define VECTOR 64
#define WIDE 4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define NAME(x) x##_avx512_float
#include "winograd.h"
#define SCALAR double
#define INDEX int64_t
#define VECTOR 64
#define WIDE 4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define NAME(x) x##_avx512_double
#include "winograd.h"
#define SCALAR float
#define INDEX int32_t
#define VECTOR 32
#define WIDE 2
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2_float
#include "winograd.h"
#define SCALAR double
#define INDEX int64_t
#define VECTOR 32
#define WIDE 2
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2_double
#include "winograd.h"
#endif

#define SCALAR float
#define INDEX int32_t
#define VECTOR 16
#define WIDE 2
#define TARGET
#define NAME(x) x##_float
#include "winograd.h"
#define SCALAR double
#define INDEX int64_t
#define VECTOR 16
#define WIDE 2
#define TARGET
#define NAME(x) x##_double
#include "winograd.h"

#ifndef LEVEL /* The tests compile with 0, the baseline, and 1, up to AVX2. */
#define LEVEL 2
#endif

static int has_avx512(void) {
#if defined(__x86_64__)
    return LEVEL > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

static int has_avx2(void) {
#if defined(__x86_64__)
    return LEVEL > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static const Kernels *kernels(int is_double) {
#if defined(__x86_64__)
    if (has_avx512()) return is_double ? &kernels_avx512_double : &kernels_avx512_float;
    if (has_avx2()) return is_double ? &kernels_avx2_double : &kernels_avx2_float;
#endif
    return is_double ? &kernels_double : &kernels_float;
}

/* Names the instruction set in use, which determines the last bits of a result. */
const char *winograd_instructions(void) {
    return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "baseline";
}

/* A thread pool for the duration of one operation; each thread takes the next group when it is done
   with one. */

typedef struct {
    const Work *work;
    const Kernels *kernels;
    atomic_llong next;
    atomic_int failed;
} Pool;

static void *work_on(void *argument) {
    Pool *pool = argument;
    const Work *work = pool->work;
    void *scratch;
    if (posix_memalign(&scratch, 64, pool->kernels->scratch)) {
        atomic_store(&pool->failed, 1);
        return NULL;
    }
    for (;;) {
        const int64_t group = atomic_fetch_add(&pool->next, 1);
        if (group * GROUP >= work->images) break;
        for (int64_t i = group * GROUP; i < (group + 1) * GROUP && i < work->images; i++)
            if (work->gradient)
                pool->kernels->backward(work, scratch, i,
                                        (char *)work->sums + group * SUMS * pool->kernels->scalar);
            else
                pool->kernels->forward(work, scratch, i);
    }
    free(scratch);
    return NULL;
}

/* Returns 0, or 1 without enough memory. */
static int work_together(const Work *work, const Kernels *kernels, int threads) {
    Pool pool = {work, kernels, 0, 0};
    pthread_t others[MOST_THREADS];
    int started = 0;
    kernels->prepare(work);
    while (started < threads - 1 && started < MOST_THREADS &&
           (started + 1) * (int64_t)GROUP < work->images &&
           !pthread_create(&others[started], NULL, work_on, &pool))
        started++;
    work_on(&pool);
    while (started) pthread_join(others[--started], NULL);
    return atomic_load(&pool.failed);
}

/* The part of TensorFlow's C API that is used (tensorflow/c/ops.h, kernels.h, tf_tensor.h,
   tf_status.h), with opaque pointers. */

enum { TF_FLOAT = 1, TF_DOUBLE = 2, TF_UINT8 = 4 };
enum { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8 };

#define API(F)                                                                                     \
    F(void *, NewOpDefinitionBuilder, (const char *))                                              \
    F(void, OpDefinitionBuilderAddAttr, (void *, const char *))                                    \
    F(void, OpDefinitionBuilderAddInput, (void *, const char *))                                   \
    F(void, OpDefinitionBuilderAddOutput, (void *, const char *))                                  \
    F(void, OpDefinitionBuilderSetShapeInferenceFunction, (void *, void (*)(void *, void *)))      \
    F(void, RegisterOpDefinition, (void *, void *))                                                \
    F(void, ShapeInferenceContextSetUnknownShape, (void *, void *))                                \
    F(void *, NewKernelBuilder,                                                                    \
      (const char *, const char *, void *(*)(void *), void (*)(void *, void *), void (*)(void *))) \
    F(void, KernelBuilder_TypeConstraint, (void *, const char *, int, void *))                     \
    F(void, RegisterKernelBuilder, (const char *, void *, void *))                                 \
    F(void, OpKernelConstruction_GetAttrType, (void *, const char *, int *, void *))               \
    F(void, OpKernelConstruction_GetAttrInt32, (void *, const char *, int32_t *, void *))          \
    F(void, OpKernelConstruction_Failure, (void *, void *))                                        \
    F(void, GetInput, (void *, int, void **, void *))                                              \
    F(void *, AllocateOutput, (void *, int, int, const int64_t *, int, size_t, void *))            \
    F(void, OpKernelContext_Failure, (void *, void *))                                             \
    F(int, NumDims, (const void *))                                                                \
    F(int64_t, Dim, (const void *, int))                                                           \
    F(void *, TensorData, (const void *))                                                          \
    F(void, DeleteTensor, (void *))                                                                \
    F(void *, NewStatus, (void))                                                                   \
    F(void, DeleteStatus, (void *))                                                                \
    F(void, SetStatus, (void *, int, const char *))                                                \
    F(int, GetCode, (const void *))

#define DECLARE(type, name, arguments) static type(*TF_##name) arguments;
API(DECLARE)

/* The attributes of an operation. */
typedef struct {
    int type;
    int32_t threads, drop;
} Attributes;

static void *create(void *construction) {
    Attributes *attributes = malloc(sizeof *attributes);
    void *status = TF_NewStatus();
    if (!attributes) TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "out of memory");
    if (TF_GetCode(status) == TF_OK)
        TF_OpKernelConstruction_GetAttrType(construction, "T", &attributes->type, status);
    if (TF_GetCode(status) == TF_OK)
        TF_OpKernelConstruction_GetAttrInt32(construction, "threads", &attributes->threads, status);
    if (TF_GetCode(status) == TF_OK)
        TF_OpKernelConstruction_GetAttrInt32(construction, "drop", &attributes->drop, status);
    if (TF_GetCode(status) != TF_OK) TF_OpKernelConstruction_Failure(construction, status);
    TF_DeleteStatus(status);
    return attributes;
}

/* The shapes of inputs and outputs; -1 stands for the number of images. Without dropout the random
   numbers are of 0 images. */
typedef struct {
    int dims;
    int64_t dim[4];
} Shape;

#define POOLED {4, {-1, TILES, TILES, C2}}
static const Shape IMAGES = {4, {-1, SIDE, SIDE, 1}};
static const Shape KERNEL1 = {4, {3, 3, 1, C1}}, BIAS1 = {1, {C1}};
static const Shape KERNEL2 = {4, {3, 3, C1, C2}}, BIAS2 = {1, {C2}};
static const Shape OUT = POOLED;

/* Returns the data of an input after checking its shape; NULL once the status is not TF_OK. */
static const void *input(void *context, int number, const Shape *shape, int64_t *images, void **kept,
                         void *status) {
    kept[number] = NULL;
    if (TF_GetCode(status) != TF_OK) return NULL;
    TF_GetInput(context, number, &kept[number], status);
    if (TF_GetCode(status) != TF_OK) return NULL;
    int right = TF_NumDims(kept[number]) == shape->dims;
    for (int i = 0; right && i < shape->dims; i++) {
        const int64_t dim = TF_Dim(kept[number], i);
        if (shape->dim[i] < 0 && *images < 0) *images = dim;
        right = dim == (shape->dim[i] < 0 ? *images : shape->dim[i]);
    }
    if (!right) {
        char message[80];
        snprintf(message, sizeof message, "input %d has another shape than expected", number);
        TF_SetStatus(status, TF_INVALID_ARGUMENT, message);
        return NULL;
    }
    return TF_TensorData(kept[number]);
}

static void *output(void *context, int number, int type, size_t size, const Shape *shape,
                    int64_t images, void **kept, void *status) {
    int64_t dim[4];
    kept[number] = NULL;
    if (TF_GetCode(status) != TF_OK) return NULL;
    for (int i = 0; i < shape->dims; i++) {
        dim[i] = shape->dim[i] < 0 ? images : shape->dim[i];
        size *= (size_t)dim[i];
    }
    kept[number] = TF_AllocateOutput(context, number, type, dim, shape->dims, size, status);
    return TF_GetCode(status) == TF_OK ? TF_TensorData(kept[number]) : NULL;
}

/* Both operations: forward with six inputs and two outputs, backward with seven and four. */
static void compute(const Attributes *attributes, void *context, int backward) {
    const Kernels *with = kernels(attributes->type == TF_DOUBLE);
    const size_t size = with->scalar;
    const int type = attributes->type;
    void *status = TF_NewStatus(), *inputs[7] = {0}, *outputs[4] = {0}, *memory = NULL;
    int64_t images = -1;
    static const Shape none = {4, {0, TILES, TILES, C2}};
    Work work = {0};
    work.x = input(context, 0, &IMAGES, &images, inputs, status);
    work.kernel1 = input(context, 1, &KERNEL1, &images, inputs, status);
    work.bias1 = input(context, 2, &BIAS1, &images, inputs, status);
    work.kernel2 = input(context, 3, &KERNEL2, &images, inputs, status);
    work.bias2 = input(context, 4, &BIAS2, &images, inputs, status);
    work.images = images;
    work.drop = attributes->drop;
    work.scale = 256.0 / (256 - attributes->drop);
    void *gradients[4] = {0};
    if (backward) {
        work.code = (unsigned char *)input(context, 5, &OUT, &images, inputs, status);
        work.gradient = input(context, 6, &OUT, &images, inputs, status);
        const Shape *shapes[4] = {&KERNEL1, &BIAS1, &KERNEL2, &BIAS2};
        for (int i = 0; i < 4; i++)
            gradients[i] = output(context, i, type, size, shapes[i], images, outputs, status);
    } else {
        work.random = input(context, 5, work.drop ? &OUT : &none, &images, inputs, status);
        work.out = output(context, 0, type, size, &OUT, images, outputs, status);
        work.code = output(context, 1, TF_UINT8, 1, &OUT, images, outputs, status);
    }
    const int64_t groups = images > GROUP ? (images + GROUP - 1) / GROUP : 1;
    if (TF_GetCode(status) == TF_OK) {
        const size_t scalars = 2 * U + (backward ? (size_t)groups * SUMS : 0);
        if (posix_memalign(&memory, 64, scalars * size)) {
            memory = NULL;
            TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "out of memory");
        }
    }
    if (TF_GetCode(status) == TF_OK) {
        work.u = memory;
        work.u_transposed = (char *)memory + U * size;
        work.sums = (char *)memory + 2 * U * size;
        if (backward) memset(work.sums, 0, (size_t)groups * SUMS * size);
        if (work_together(&work, with, attributes->threads))
            TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "out of memory");
        else if (backward)
            with->finish(&work, groups, gradients[0], gradients[1], gradients[2], gradients[3]);
    }
    if (TF_GetCode(status) != TF_OK) TF_OpKernelContext_Failure(context, status);
    free(memory);
    for (int i = 0; i < 7; i++)
        if (inputs[i]) TF_DeleteTensor(inputs[i]);
    for (int i = 0; i < 4; i++)
        if (outputs[i]) TF_DeleteTensor(outputs[i]);
    TF_DeleteStatus(status);
}

static void compute_forward(void *attributes, void *context) { compute(attributes, context, 0); }
static void compute_backward(void *attributes, void *context) { compute(attributes, context, 1); }

static void define(const char *name, const char *const *inputs, const char *const *outputs,
                   void (*compute)(void *, void *), void *status) {
    static const char *const attributes[] = {"T: {float, double}", "threads: int >= 1",
                                             "drop: int >= 0", NULL};
    static const int types[] = {TF_FLOAT, TF_DOUBLE};
    void *builder = TF_NewOpDefinitionBuilder(name);
    for (int i = 0; attributes[i]; i++) TF_OpDefinitionBuilderAddAttr(builder, attributes[i]);
    for (int i = 0; inputs[i]; i++) TF_OpDefinitionBuilderAddInput(builder, inputs[i]);
    for (int i = 0; outputs[i]; i++) TF_OpDefinitionBuilderAddOutput(builder, outputs[i]);
    TF_OpDefinitionBuilderSetShapeInferenceFunction(builder,
                                                    TF_ShapeInferenceContextSetUnknownShape);
    TF_RegisterOpDefinition(builder, status);
    for (int i = 0; i < 2 && TF_GetCode(status) == TF_OK; i++) {
        builder = TF_NewKernelBuilder(name, "CPU", create, compute, free);
        TF_KernelBuilder_TypeConstraint(builder, "T", types[i], status);
        if (TF_GetCode(status) == TF_OK) TF_RegisterKernelBuilder(name, builder, status);
    }
}

/* Runs when the library is loaded, by tf.load_op_library. Without TensorFlow it does nothing. */
__attribute__((constructor)) static void define_both(void) {
    static const char *const names[] = {
        "libtensorflow_framework.so.2", /* its soname, since it is loaded already */
        "libtensorflow_framework.2.dylib",
        "@rpath/libtensorflow_framework.2.dylib",
    };
    void *tensorflow = NULL;
    for (size_t i = 0; !tensorflow && i < sizeof names / sizeof *names; i++)
        tensorflow = dlopen(names[i], RTLD_LAZY | RTLD_NOLOAD);
    if (!tensorflow) return;
#define FIND(type, name, arguments)                                                                \
    *(void **)&TF_##name = dlsym(tensorflow, "TF_" #name);                                         \
    if (!TF_##name) return;
    API(FIND)
    static const char *const forward_inputs[] = {"images: T",  "kernel1: T", "bias1: T",
                                                 "kernel2: T", "bias2: T",   "random: uint8", NULL};
    static const char *const forward_outputs[] = {"out: T", "code: uint8", NULL};
    static const char *const backward_inputs[] = {"images: T", "kernel1: T",  "bias1: T",
                                                  "kernel2: T", "bias2: T", "code: uint8",
                                                  "gradient: T", NULL};
    static const char *const backward_outputs[] = {"kernel1_gradient: T", "bias1_gradient: T",
                                                   "kernel2_gradient: T", "bias2_gradient: T", NULL};
    void *status = TF_NewStatus();
    define("WinogradPool", forward_inputs, forward_outputs, compute_forward, status);
    if (TF_GetCode(status) == TF_OK)
        define("WinogradPoolGrad", backward_inputs, backward_outputs, compute_backward, status);
    TF_DeleteStatus(status);
}

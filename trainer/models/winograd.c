/* Two TensorFlow operations, for CPUs: what the network does to an image up to the dropout behind
   its pooling, and the gradient of that. trainer/fast.py calls them.

   The second convolution is three quarters of the network's arithmetic. It is done here as Winograd's
   F(2x2, 3x3) (Lavin and Gray, 2015, https://arxiv.org/abs/1509.09308): a tile of 4 by 4 inputs gives
   2 by 2 outputs with 16 products a pair of channels in place of 36. Such a tile of outputs is just
   what one place of the pooling looks at, so bias, pooling, relu and dropout are done while it is in
   registers, and of each pooled value a byte remembers where its gradient goes. The backward pass is
   the derivative of the same algorithm: the transformed tiles serve both gradients. A core works on
   one image at a time, in its own cache.

   The sums over images are made in groups of GROUP, whose results are added in order: bits do not
   depend on the number of threads.

   TensorFlow's C API is looked up in the process, so neither TensorFlow nor Python is needed to
   compile this, and one file serves all their versions. */

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
    STRIP = 24,  /* tiles at a time: what is known of them fits into a cache of half a megabyte */
    GROUP = 8,   /* images whose gradients are added up together */
    NOWHERE = 4, /* the code of a pooled value whose gradient goes to none of the four places */
    MOST_THREADS = 256,
};

typedef struct {
    int64_t images;
    const void *x;                /* [images][SIDE][SIDE] */
    const void *kernel1, *bias1;  /* [3][3][1][C1], [C1] */
    const void *kernel2, *bias2;  /* [3][3][C1][C2], [C2] */
    const unsigned char *random;  /* [images][TILES][TILES][C2], or NULL without dropout */
    int drop;                     /* random numbers below this drop */
    double scale;                 /* of what is not dropped */
    unsigned char *code;          /* [images][TILES][TILES][C2] */
    void *out;                    /* the same, pooled */
    const void *gradient;         /* of out */
    void *u, *u_transposed;       /* kernel2, transformed: [16][C1][C2], [16][C2][C1] */
    void *sums;                   /* [groups] of the gradients of u, bias2, kernel1, bias1 */
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

#ifndef LEVEL /* 0 and 1 leave out the better instructions, for the tests */
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

/* Names the instruction set that is used, which decides last bits. */
const char *winograd_instructions(void) {
    return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "baseline";
}

/* Threads that live as long as one operation, and take group after group. */

typedef struct {
    const Work *work;
    const Kernels *kernels;
    atomic_llong next;
    atomic_int failed;
} Crew;

static void *work_on(void *argument) {
    Crew *crew = argument;
    const Work *work = crew->work;
    void *scratch;
    if (posix_memalign(&scratch, 64, crew->kernels->scratch)) {
        atomic_store(&crew->failed, 1);
        return NULL;
    }
    for (;;) {
        const int64_t group = atomic_fetch_add(&crew->next, 1);
        if (group * GROUP >= work->images) break;
        for (int64_t i = group * GROUP; i < (group + 1) * GROUP && i < work->images; i++)
            if (work->gradient)
                crew->kernels->backward(work, scratch, i,
                                        (char *)work->sums + group * SUMS * crew->kernels->scalar);
            else
                crew->kernels->forward(work, scratch, i);
    }
    free(scratch);
    return NULL;
}

/* Returns 0, or 1 where memory is short. */
static int work_together(const Work *work, const Kernels *kernels, int threads) {
    Crew crew = {work, kernels, 0, 0};
    pthread_t others[MOST_THREADS];
    int started = 0;
    kernels->prepare(work);
    while (started < threads - 1 && started < MOST_THREADS &&
           (started + 1) * (int64_t)GROUP < work->images &&
           !pthread_create(&others[started], NULL, work_on, &crew))
        started++;
    work_on(&crew);
    while (started) pthread_join(others[--started], NULL);
    return atomic_load(&crew.failed);
}

/* TensorFlow's C API (tensorflow/c/ops.h, kernels.h, tf_tensor.h, tf_status.h): what of it is used,
   with opaque pointers. */

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

/* One operation's attributes. */
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

/* The shapes of inputs and outputs; -1 stands for the number of images, and 0 images of random
   numbers for none. */
typedef struct {
    int dims;
    int64_t dim[4];
} Shape;

#define POOLED {4, {-1, TILES, TILES, C2}}
static const Shape IMAGES = {4, {-1, SIDE, SIDE, 1}};
static const Shape KERNEL1 = {4, {3, 3, 1, C1}}, BIAS1 = {1, {C1}};
static const Shape KERNEL2 = {4, {3, 3, C1, C2}}, BIAS2 = {1, {C2}};
static const Shape OUT = POOLED;

/* Returns the data of an input of this shape; NULL once the status is not TF_OK. */
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

/* The operation in either direction: six inputs and two outputs, or seven and four. */
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
        "libtensorflow_framework.so.2", /* by its soname: it is loaded already */
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

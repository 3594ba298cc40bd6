/* The part of ONNX Runtime's C interface that custom operators need, declared here: its table of functions only ever grows, and
 * no package carries its header. Version 17 (ONNX Runtime 1.17) brought KernelContext_ParallelFor. */
#ifndef RK_ONNXRUNTIME_ABI_H
#define RK_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 17

typedef struct OrtStatus OrtStatus;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo;
typedef struct OrtDomain OrtDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef void *const *OrtApi; /* the table of functions */

typedef struct {
    OrtApi (*get_api)(uint32_t version);
    const char *(*version)(void);
} OrtApiBase;

enum { ORT_UNDEFINED, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7, ORT_BOOL = 9 };
enum { ORT_REQUIRED, ORT_OPTIONAL, ORT_VARIADIC };
enum { ORT_INVALID_ARGUMENT = 2 };

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*create_kernel)(const OrtCustomOp *, OrtApi, const OrtKernelInfo *);
    const char *(*name)(const OrtCustomOp *);
    const char *(*execution_provider)(const OrtCustomOp *);
    int (*input_type)(const OrtCustomOp *, size_t);
    size_t (*input_count)(const OrtCustomOp *);
    int (*output_type)(const OrtCustomOp *, size_t);
    size_t (*output_count)(const OrtCustomOp *);
    void (*compute)(void *, OrtKernelContext *);
    void (*destroy)(void *);
    int (*input_characteristic)(const OrtCustomOp *, size_t);
    int (*output_characteristic)(const OrtCustomOp *, size_t);
    int (*input_memory_type)(const OrtCustomOp *, size_t);
    int (*variadic_input_min_arity)(const OrtCustomOp *);
    int (*variadic_input_homogeneity)(const OrtCustomOp *);
    int (*variadic_output_min_arity)(const OrtCustomOp *);
    int (*variadic_output_homogeneity)(const OrtCustomOp *);
    OrtStatus *(*create_kernel_v2)(const OrtCustomOp *, OrtApi, const OrtKernelInfo *, void **);
    OrtStatus *(*compute_v2)(void *, OrtKernelContext *);
    OrtStatus *(*infer_output_shape)(const OrtCustomOp *, void *);
    int (*start_version)(const OrtCustomOp *);
    int (*end_version)(const OrtCustomOp *);
};

/* Functions of the table: position, result, arguments. */
#define ORT_CREATE_STATUS(api) ((OrtStatus * (*)(int, const char *)) (api)[0])
#define ORT_CREATE_DOMAIN(api) ((OrtStatus * (*)(const char *, OrtDomain **)) (api)[26])
#define ORT_DOMAIN_ADD(api) ((OrtStatus * (*)(OrtDomain *, const OrtCustomOp *)) (api)[27])
#define ORT_ADD_DOMAIN(api) ((OrtStatus * (*)(OrtSessionOptions *, OrtDomain *)) (api)[28])
#define ORT_DATA(api) ((OrtStatus * (*)(OrtValue *, void **)) (api)[51])
#define ORT_ELEMENT_TYPE(api) ((OrtStatus * (*)(const OrtTensorInfo *, int32_t *)) (api)[60])
#define ORT_DIMENSIONS_COUNT(api) ((OrtStatus * (*)(const OrtTensorInfo *, size_t *)) (api)[61])
#define ORT_DIMENSIONS(api) ((OrtStatus * (*)(const OrtTensorInfo *, int64_t *, size_t)) (api)[62])
#define ORT_TENSOR_INFO(api) ((OrtStatus * (*)(const OrtValue *, OrtTensorInfo **)) (api)[65])
#define ORT_ATTRIBUTE_FLOAT(api) ((OrtStatus * (*)(const OrtKernelInfo *, const char *, float *)) (api)[85])
#define ORT_ATTRIBUTE_INT(api) ((OrtStatus * (*)(const OrtKernelInfo *, const char *, int64_t *)) (api)[86])
#define ORT_ATTRIBUTE_STRING(api) ((OrtStatus * (*)(const OrtKernelInfo *, const char *, char *, size_t *)) (api)[87])
#define ORT_INPUT(api) ((OrtStatus * (*)(const OrtKernelContext *, size_t, const OrtValue **)) (api)[90])
#define ORT_OUTPUT(api) ((OrtStatus * (*)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)) (api)[91])
#define ORT_RELEASE_STATUS(api) ((void (*)(OrtStatus *)) (api)[93])
#define ORT_RELEASE_TENSOR_INFO(api) ((void (*)(OrtTensorInfo *)) (api)[99])
#define ORT_CONSTANT_INPUT(api) ((OrtStatus * (*)(const OrtKernelInfo *, size_t, int *, const OrtValue **)) (api)[249])
#define ORT_PARALLEL_FOR(api) \
    ((OrtStatus * (*)(const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)) (api)[274])

#endif

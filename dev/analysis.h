/*
 * What dev/check --static tells gcc's and clang's analyzers of PostgreSQL: which
 * functions give back what they are given, so that a use of it after the call
 * is found as one of memory after free() is.
 *
 * It is included before anything else, so it repeats declarations of core's
 * without their headers.  What is not given back goes with its memory context
 * and is no leak, and palloc() does not return NULL: dev/check leaves out these
 * warnings.
 *
 * dshash_release_lock() is not among them, though an entry may go after it: that
 * of a buffer stays as long as its relation is locked or the worker is its own.
 */
#include <stddef.h>

struct MemoryContextData;
struct RelationData;
struct TupleDescData;
struct dsa_area;
struct dshash_table;

#ifdef __clang__
#define gives_back(argument) __attribute__((ownership_takes(malloc, argument)))
#else
#define gives_back(argument)
#endif

extern void pfree(void *pointer) gives_back(1);
extern void MemoryContextDelete(struct MemoryContextData *context) gives_back(1);
extern void FreeTupleDesc(struct TupleDescData *tupdesc) gives_back(1);
extern void relation_close(struct RelationData *relation, int lockmode) gives_back(1);
extern void table_close(struct RelationData *relation, int lockmode) gives_back(1);
extern void dsa_detach(struct dsa_area *area) gives_back(1);
extern void dshash_detach(struct dshash_table *hash_table) gives_back(1);

/* gcc follows a pointer from where it comes from */
#ifndef __clang__
extern void *palloc(size_t size) __attribute__((malloc(pfree, 1)));
extern void *palloc0(size_t size) __attribute__((malloc(pfree, 1)));
#endif

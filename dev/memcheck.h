/*
 * What PostgreSQL tells valgrind about its memory, told to the address
 * sanitizer.
 *
 * palloc() takes small chunks from large blocks, so that the sanitizer by
 * itself sees neither the end of a chunk nor that it was freed.  PostgreSQL
 * marks both for valgrind, in files that include <valgrind/memcheck.h> when
 * USE_VALGRIND is defined.  This file is put in the place of that.
 *
 * The sanitizer cannot tell memory that was not yet written to, and a chunk
 * that is freed is marked before VALGRIND_MEMPOOL_FREE().
 */
#include <sanitizer/asan_interface.h>

#define VALGRIND_MAKE_MEM_NOACCESS(address, size) \
	__asan_poison_memory_region(address, size)
#define VALGRIND_MAKE_MEM_UNDEFINED(address, size) \
	__asan_unpoison_memory_region(address, size)
#define VALGRIND_MAKE_MEM_DEFINED(address, size) \
	__asan_unpoison_memory_region(address, size)
#define VALGRIND_MEMPOOL_ALLOC(pool, address, size) \
	__asan_unpoison_memory_region(address, size)
#define VALGRIND_MEMPOOL_CHANGE(pool, old, address, size) \
	__asan_unpoison_memory_region(address, size)

#define VALGRIND_CREATE_MEMPOOL(pool, redzone, zeroed)	((void) 0)
#define VALGRIND_DESTROY_MEMPOOL(pool)					((void) 0)
#define VALGRIND_MEMPOOL_FREE(pool, address)			((void) 0)
#define VALGRIND_MEMPOOL_TRIM(pool, address, size)		((void) 0)
#define VALGRIND_CHECK_MEM_IS_DEFINED(address, size)	((void) 0)
#define VALGRIND_COUNT_ERRORS							0
#define VALGRIND_PRINTF(...)							((void) 0)

/*-------------------------------------------------------------------------
 *
 * sums.c
 *	  What rows of the ledger have of each key, added up.
 *
 * In local memory.  The caller reads the ledger, and says what the keys of a row
 * are of: equal keys of different things have different sums.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "sums.h"
#include "utils/memutils.h"

static inline uint32
hash_key(const SumKey *key)
{
	return key->bytes.hash ^ murmurhash32((uint32) ((uintptr_t) key->of >> 3));
}

static inline bool
same_key(const SumKey *a, const SumKey *b)
{
	return a->of == b->of && a->bytes.hash == b->bytes.hash &&
		a->bytes.len == b->bytes.len &&
		memcmp(a->bytes.data, b->bytes.data, KEY_LENGTH(a->bytes.len)) == 0;
}

#define SH_PREFIX			keysums
#define SH_ELEMENT_TYPE		KeySum
#define SH_KEY_TYPE			SumKey
#define SH_KEY				key
#define SH_HASH_KEY(tb, key)	hash_key(&(key))
#define SH_EQUAL(tb, a, b)	same_key(&(a), &(b))
#define SH_SCOPE			extern
#define SH_DEFINE
#include "lib/simplehash.h"

/* Begin to add up rows, in a memory context that is deleted in the end. */
void
sums_begin(KeySums *sums, MemoryContext context)
{
	sums->hash = keysums_create(context, 1024, NULL);
	sums->keys = GenerationContextCreate(context, "statbuffer ledger keys",
										 ALLOCSET_DEFAULT_SIZES);
}

/* Add the keys of a row, as keys of something. */
void
sums_add_row(KeySums *sums, void *of, LedgerRow *row)
{
	LedgerKey	from;

	while (ledger_next_key(row, &from))
	{
		SumKey		key = {
			.of = of,
			.bytes = {from.data, from.len, key_hash(from.data, from.len)}
		};
		KeySum	   *entry;
		bool		found;

		entry = keysums_insert(sums->hash, key, &found);
		if (!found)
		{
			char	   *copy = MemoryContextAlloc(sums->keys,
												  Max(KEY_LENGTH(from.len), 1));

			memcpy(copy, from.data, KEY_LENGTH(from.len));
			entry->key.bytes.data = copy;
			entry->sum = 0;
		}

		/* it may exceed the range on the way, but not in the end */
		entry->sum = (int64) ((uint64) entry->sum + (uint64) from.count);
	}
}

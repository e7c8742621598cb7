/*-------------------------------------------------------------------------
 *
 * sums.h
 *	  What rows of the ledger have of each key, added up.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SUMS_H
#define STATBUFFER_SUMS_H

#include "key.h"
#include "ledger.h"

/* A key of something that the caller tells apart. */
typedef struct SumKey
{
	void	   *of;
	KeyBytes	bytes;
} SumKey;

/* A key, and its sum, which may be 0. */
typedef struct KeySum
{
	SumKey		key;
	int64		sum;
	char		status;			/* for simplehash.h */
} KeySum;

#define SH_PREFIX			keysums
#define SH_ELEMENT_TYPE		KeySum
#define SH_KEY_TYPE			SumKey
#define SH_SCOPE			extern
#define SH_DECLARE
#include "lib/simplehash.h"

/* They are looked up, and walked through, with the functions of simplehash.h. */
typedef struct KeySums
{
	keysums_hash *hash;
	MemoryContext keys;			/* of their bytes */
} KeySums;

extern void sums_begin(KeySums *sums, MemoryContext context);
extern void sums_add_row(KeySums *sums, void *of, LedgerRow *row);

#endif							/* STATBUFFER_SUMS_H */

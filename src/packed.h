/*-------------------------------------------------------------------------
 *
 * packed.h
 *	  Numbers in as few bytes as they need, for the file of saved counts and
 *	  the ledger.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_PACKED_H
#define STATBUFFER_PACKED_H

/* how long a packed number can be */
#define PACKED_NUMBER_MAX	10

/* Numbers near to 0 become small ones, whatever their sign. */
static inline uint64
fold_sign(int64 value)
{
	return ((uint64) value << 1) ^ (value < 0 ? PG_UINT64_MAX : 0);
}

static inline int64
unfold_sign(uint64 value)
{
	return (int64) ((value >> 1) ^ ((value & 1) != 0 ? PG_UINT64_MAX : 0));
}

/* Store a number in groups of 7 bits, lowest first; returns what follows. */
static inline char *
pack_number(char *to, uint64 value)
{
	while (value >= 0x80)
	{
		*to++ = (char) (value | 0x80);
		value >>= 7;
	}
	*to++ = (char) value;
	return to;
}

/* Read one; returns what follows, or NULL if it goes beyond the end. */
static inline const char *
unpack_number(const char *from, const char *end, uint64 *value)
{
	*value = 0;
	for (int shift = 0; shift < 64 && from < end; shift += 7)
	{
		unsigned char byte = (unsigned char) *from++;

		*value |= (uint64) (byte & 0x7F) << shift;
		if ((byte & 0x80) == 0)
			return from;
	}
	return NULL;
}

#endif							/* STATBUFFER_PACKED_H */

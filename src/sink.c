/*-------------------------------------------------------------------------
 *
 * sink.c
 *	  What sinks have in common.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "sink.h"
#include "utils/array.h"

/*
 * Make an array of each key column, and one of the counts.  The arrays are in the
 * current memory context.
 */
void
sink_make_arrays(TupleDesc desc, const SinkKey *keys, int nkeys,
				 Datum *arrays)
{
	Datum	   *values = palloc(nkeys * sizeof(Datum));
	bool	   *isnull = palloc(nkeys * sizeof(bool));
	int			lower_bound = 1;

	for (int column = 0; column < desc->natts; column++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, column);

		for (int i = 0; i < nkeys; i++)
		{
			values[i] = keys[i].values[column];
			isnull[i] = keys[i].isnull[column];
		}
		arrays[column] =
			PointerGetDatum(construct_md_array(values, isnull, 1, &nkeys,
											   &lower_bound, att->atttypid,
											   att->attlen, att->attbyval,
											   att->attalign));
	}

	for (int i = 0; i < nkeys; i++)
		values[i] = Int64GetDatum(keys[i].count);
	arrays[desc->natts] =
		PointerGetDatum(construct_array(values, nkeys, INT8OID, sizeof(int64),
										FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

# A handler runs as a client's statements between BEGIN and COMMIT do.  Code that
# it calls may ask whether it is in a transaction block, and if it is not, do at
# once, somewhere else, what cannot be taken back; and it may watch which
# functions are executed.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;

plan skip_all => 'nothing to build a library with' unless can_build_library();

# Tells whether there is a block; and keeps outside of the transaction what it is
# given, unless there is one.  And notes which functions are executed.
my $probe = build_library('probe', q{
	#include "postgres.h"
	#include "access/xact.h"
	#include "catalog/objectaccess.h"
	#include "catalog/pg_proc.h"
	#include "fmgr.h"
	#include "utils/builtins.h"
	#include "utils/lsyscache.h"

	PG_MODULE_MAGIC;

	extern PGDLLEXPORT void _PG_init(void);
	extern PGDLLEXPORT Datum probe_block(PG_FUNCTION_ARGS);
	extern PGDLLEXPORT Datum probe_commits_at_once(PG_FUNCTION_ARGS);

	static object_access_hook_type prev_hook;

	static void
	hook(ObjectAccessType access, Oid classId, Oid objectId, int subId, void *arg)
	{
		if (prev_hook)
			prev_hook(access, classId, objectId, subId, arg);
		if (access == OAT_FUNCTION_EXECUTE && classId == ProcedureRelationId && IsTransactionState())
		{
			char *name = get_func_name(objectId);

			if (name && strncmp(name, "store_", 6) == 0)
				elog(LOG, "executed: %s", name);
		}
	}

	void
	_PG_init(void)
	{
		prev_hook = object_access_hook;
		object_access_hook = hook;
	}

	PG_FUNCTION_INFO_V1(probe_block);
	Datum
	probe_block(PG_FUNCTION_ARGS)
	{
		PG_RETURN_BOOL(IsTransactionBlock());
	}

	PG_FUNCTION_INFO_V1(probe_commits_at_once);
	Datum
	probe_commits_at_once(PG_FUNCTION_ARGS)
	{
		if (!IsTransactionBlock())
			elog(LOG, "stored elsewhere: %s", text_to_cstring(PG_GETARG_TEXT_PP(0)));
		PG_RETURN_VOID();
	}
});

my $node = new_node('main', "shared_preload_libraries = '$probe'");
my $db = 'postgres';

sql(qq{
	CREATE FUNCTION block() RETURNS boolean LANGUAGE c AS '$probe', 'probe_block';
	CREATE FUNCTION elsewhere(text) RETURNS void LANGUAGE c AS '$probe', 'probe_commits_at_once';
	CREATE TABLE calls (handler text, key text, counter bigint, block boolean, at_commit boolean);
	CREATE TABLE bad (key text);

	-- looked at once more when the transaction is about to commit
	CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS \$\$
	BEGIN
		UPDATE calls SET at_commit = block() WHERE ctid = (SELECT max(ctid) FROM calls WHERE key = new.key AND handler = new.handler);
		RETURN NULL;
	END
	\$\$;
	CREATE CONSTRAINT TRIGGER late AFTER INSERT ON calls DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION at_commit();

	CREATE FUNCTION note(handler text, key text, counter bigint) RETURNS void LANGUAGE plpgsql AS \$\$
	BEGIN
		PERFORM elsewhere(key);
		IF EXISTS (SELECT FROM bad b WHERE b.key = note.key) THEN
			RAISE 'bad key %', key;
		END IF;
		PERFORM pg_advisory_xact_lock_shared(4713);
		INSERT INTO calls VALUES (handler, key, counter, block());
	END
	\$\$;
	CREATE FUNCTION store_one(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS
		\$\$ BEGIN PERFORM note('one', key, counter); END \$\$;
	CREATE FUNCTION store_arrays(keys text[], counters bigint[]) RETURNS void LANGUAGE plpgsql AS
		\$\$ BEGIN PERFORM note('arrays', k, c) FROM unnest(keys, counters) u(k, c); END \$\$;

	-- catches an error, which takes a subtransaction
	CREATE FUNCTION store_caught(key text, counter bigint) RETURNS boolean LANGUAGE plpgsql AS \$\$
	BEGIN
		BEGIN
			PERFORM 1 / 0;
		EXCEPTION WHEN division_by_zero THEN
			PERFORM note('caught', key, counter);
		END;
		RETURN true;
	END
	\$\$;
	-- a body that the planner takes into the expression which calls it
	CREATE FUNCTION store_sql(key text, counter bigint) RETURNS boolean LANGUAGE sql AS
		\$\$ SELECT store_caught(key, counter) \$\$;
});
my @handlers = qw(one arrays caught sql);
foreach my $handler (@handlers)
{
	sql(qq{CREATE FOREIGN TABLE $handler (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'store_$handler', interval '1h', timeout '1h', backoff '1h')});
}

is(sql('SELECT block()'), 'f', 'a statement alone is in no block');
is(sql('BEGIN; SELECT block(); COMMIT'), 't', 'and between BEGIN and COMMIT in one');

foreach my $handler (@handlers)
{
	my $noted = $handler eq 'sql' ? 'caught' : $handler;
	my $offset = -s $node->logfile;

	# a batch that is stored
	sql(qq{TRUNCATE calls; INSERT INTO $handler VALUES ('a', 1), ('b', 2)});
	is(sql(qq{SELECT sb_drain('$handler')}), 't', "$handler: stored");
	is(sql('SELECT handler, key, counter, block, at_commit FROM calls ORDER BY key'),
		"$noted|a|1|t|t\n$noted|b|2|t|t", "$handler: called in a transaction block, which lasts to its end");
	is(lines_in_log($node, "executed: store_$handler\$", $offset), 1, "$handler: its execution is seen, once a batch");

	# one with a key that fails: it is left, the others are stored once
	sql(qq{INSERT INTO bad VALUES ('zbad'); INSERT INTO $handler VALUES ('a'), ('b'), ('zbad')});
	sql(qq{SELECT sb_flush_all('$handler')});
	wait_for($node, $db, qq{SELECT array_agg(key ORDER BY key) = '{zbad}' AND sum(count) = 1 AND sum(failures) = 1
			FROM sb_keys('$handler') WHERE count + in_flight <> 0}, "$handler: a key fails");
	is(sql('SELECT key, sum(counter) FROM calls GROUP BY key ORDER BY key'), "a|2\nb|3", "$handler: the others are stored once");
	is(lines_in_log($node, 'stored elsewhere', $offset), 0, "$handler: and nothing elsewhere of the batch that failed");
	sql(qq{DELETE FROM bad; SELECT sb_flush_all('$handler')});
	is(sql(qq{SELECT sb_drain('$handler')}), 't', "$handler: stored at last");

	# cancelled and terminated with the batch under way
	foreach my $how (qw(cancel terminate))
	{
		my $gate = close_gate($node, $db);

		sql(qq{INSERT INTO $handler VALUES ('$how', 5), ('too', 6); SELECT sb_flush_all('$handler')});
		wait_for($node, $db, qq{SELECT in_flight = 11 FROM sb_stat_buffers
				WHERE relid = '$handler'::regclass AND EXISTS (SELECT FROM pg_locks WHERE objid = 4713 AND NOT granted)},
			"$handler, $how: under way");
		my $pid = sql(qq{SELECT pid FROM sb_stat_buffers WHERE relid = '$handler'::regclass});
		sql("SELECT pg_${how}_backend($pid)");
		wait_for($node, $db, qq{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid AND backend_type = 'statbuffer worker')
				OR (SELECT in_flight = 0 FROM sb_stat_buffers WHERE relid = '$handler'::regclass)},
			"$handler, $how: rolled back");
		open_gate($gate);
		is(sql(qq{SELECT sb_drain('$handler')}), 't', "$handler, $how: and stored later");
		is(sql(qq{SELECT sum(counter) FILTER (WHERE key = '$how'), bool_and(block) FROM calls}), '5|t', "$handler, $how: once, in a block");
	}
	is(sql(q{SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'}), '0', "$handler: no lock is left");
}

# A block does not allow more: a handler cannot commit, nor do what may not be
# undone, and a statement that wants a block finds one.
sql(q{
	CREATE FUNCTION store_deed(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS
		$$ BEGIN EXECUTE key; INSERT INTO calls VALUES ('deed', key, counter, block()); END $$;
	CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$;
	CREATE FOREIGN TABLE deed (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_deed', interval '1h', timeout '1h', backoff '1h');
	TRUNCATE calls;
});
my %refused = (
	'COMMIT' => 'EXECUTE of transaction commands is not implemented',
	'CALL commits()' => 'invalid transaction termination',
	'DO $$ BEGIN ROLLBACK; END $$' => 'invalid transaction termination',
	'VACUUM calls' => 'VACUUM cannot run inside a transaction block',
	'LOCK TABLE calls' => undef,
	'DECLARE c CURSOR FOR SELECT 1' => undef);
sql(qq{INSERT INTO deed VALUES (\$deed\$$_\$deed\$); SELECT sb_flush(\$deed\$$_\$deed\$, 'deed')}) foreach sort keys %refused;
foreach my $deed (sort keys %refused)
{
	wait_for($node, $db, qq{SELECT NOT EXISTS (SELECT FROM sb_keys('deed')
			WHERE key = \$deed\$$deed\$deed\$ AND count + in_flight <> 0 AND failures = 0)}, "tried: $deed");
	is(sql(qq{SELECT last_error FROM sb_keys('deed') WHERE key = \$deed\$$deed\$deed\$}), $refused{$deed} // q{}, "as in a client's block: $deed");
}
is(sql('SELECT count(*), bool_and(block) FROM calls'), '2|t', 'what may be done was done');

$node->stop;
done_testing();

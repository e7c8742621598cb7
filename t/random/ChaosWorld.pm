# The world of the chaos test: tables, roles, handlers and buffers, and how each
# key's count is known to be exact.  What the sessions do that count there is in
# ChaosScripts.pm, and what happens to them in ChaosEvents.pm.
#
# What a transaction counts it also writes to the table "ledger", so the
# ledger has what was committed.  Handlers store in the table "stored".
#
# Both tables can be locked so that nothing that is counted or stored can be
# in the middle of it: a transaction that counts has locked the ledger until
# its counts are published, and one that stores has locked "stored" until the
# buffer knows of it.  So with the two locked, for each key
#
#	ledger = stored + held
#
# whatever else goes on.  See balance_sql().
#
# Asynchronous increments do not depend on the transaction.  A sequence, which
# no rollback undoes either, is advanced before each and another one after it;
# the truth is in between, and the two differ only when a session was cut off
# just there.

package ChaosWorld;

use strict;
use warnings;

use Exporter 'import';

our @EXPORT = qw(
  world_sql handler_sql balance_sql doubtful_sql random_option
  @exact_buffers @owners @failure_kinds $nasync
);

# Those whose keys are compared at every reckoning.
our @exact_buffers =
  qw(hot wide pairs attempts rough merged rare stuck);

# The roles that buffers may belong to.
our @owners = qw(postgres keeper repeater serializer);

# Each has a sequence that counts failures.
our @failure_kinds = (
	'error', 'returned_false', 'returned_null', 'as_if_deadlocked',
	'as_if_cancelled', 'refused_at_commit', 'deadlock', 'serialization',
	'lock_timeout', 'cut_off');

# How many keys are counted in asynchronously.
our $nasync = 8;

# Handlers that are dropped and made again meanwhile.
my %handler = (
	'store_hot(text[], bigint[])' => q{
CREATE OR REPLACE FUNCTION store_hot(keys text[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('hot', keys, counts) $$},
	'store_wide(int, bigint)' => q{
CREATE OR REPLACE FUNCTION store_wide(key int, count bigint) RETURNS boolean
LANGUAGE sql AS $$ SELECT store_plainly('wide', ARRAY[key::text], ARRAY[count]) $$},
	'store_pairs(int[], text[], bigint[])' => q{
CREATE OR REPLACE FUNCTION store_pairs(a int[], b text[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$
	SELECT store('pairs', array_agg(x || ' ' || coalesce(y, 'null')), array_agg(z))
	FROM unnest(a, b, counts) AS u (x, y, z)
$$;
ALTER FUNCTION store_pairs OWNER TO handlers},
	'store_attempts(text, bigint)' => q{
CREATE OR REPLACE FUNCTION store_attempts(key text, count bigint) RETURNS boolean
LANGUAGE sql AS $$ SELECT store_plainly('attempts', ARRAY[key], ARRAY[count]) $$},
	'store_rough(int[], bigint[])' => q{
CREATE OR REPLACE FUNCTION store_rough(keys int[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('rough', keys::text[], counts) $$});

# handler_sql(NAME): how to make a handler again; without a name, a random
# handler's name.
sub handler_sql
{
	my ($name) = @_;
	my @names = sort keys %handler;

	return $names[ int rand @names ] if !defined $name;
	return $handler{$name};
}

# An option that any buffer may have, and a value for it.
sub random_option
{
	my @options = (
		[ 'interval', int(rand 300) . 'ms' ],
		[ 'jitter', int(rand 100) . 'ms' ],
		[ 'timeout', 50 + int(rand 1500) . 'ms' ],
		[ 'backoff', 10 + int(rand 100) . 'ms' ],
		[ 'shutdown', (0, '200ms', '1s', '3s')[ int rand 4 ] ],
		[ 'batch_size', (1, 3, 20, 300, 10000)[ int rand 5 ] ],
		[ 'batch_time', (0, 1, '10ms', '1s')[ int rand 4 ] ],
		[ 'handler_timeout', (0, 0, '50ms', '500ms')[ int rand 4 ] ]);

	return @{ $options[ int rand @options ] };
}

# A buffer's definition, with all the options that are going to be changed.
sub buffer_sql
{
	my ($columns, $handler, %options) = @_;
	my %all = (
		handler => $handler,
		interval => '100ms',
		jitter => '0',
		timeout => '1s',
		backoff => '50ms',
		shutdown => '1s',
		batch_size => '1000',
		batch_time => '1s',
		handler_timeout => '0',
		%options);

	return
	  "($columns, n bigint NOT NULL) SERVER statbuffer OPTIONS ("
	  . join(', ', map { "$_ '$all{$_}'" } sort keys %all) . ");\n";
}

sub world_sql
{
	my $sql = q{
CREATE EXTENSION statbuffer;

-- Who buffers belong to.  A handler may belong to a role that the owner is a
-- member of.
CREATE ROLE handlers;
CREATE ROLE stranger;
CREATE ROLE keeper LOGIN IN ROLE handlers;
CREATE ROLE repeater LOGIN IN ROLE handlers;
CREATE ROLE serializer LOGIN IN ROLE handlers;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO handlers;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO handlers;

-- what was committed: the latest, and what was looked at before, added up
CREATE TABLE ledger (buffer text, key text, n bigint);
CREATE TABLE books (buffer text, key text, n bigint, entries bigint, PRIMARY KEY (buffer, key));

CREATE TABLE stored (buffer text, key text, n bigint, touched bigint NOT NULL DEFAULT 0, PRIMARY KEY (buffer, key))
WITH (fillfactor = 50);

-- how handlers feel: the probability of each way to fail
CREATE TABLE mood (failing float8, slow float8, stuck boolean);
INSERT INTO mood VALUES (0.05, 0.01, true);

-- Fails now and then, in one of several ways; false is one of them.  Seldom if
-- the scale is small.
CREATE FUNCTION in_the_mood(scale float8) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	m mood;
BEGIN
	SELECT * INTO m FROM mood;
	IF random() < m.slow * scale THEN
		BEGIN
			PERFORM pg_sleep(random() * 0.3);
		EXCEPTION WHEN query_canceled THEN
			PERFORM nextval('failed_cut_off');
			RAISE;
		END;
	END IF;
	IF random() < m.failing * scale THEN
		CASE floor(random() * 5)::int
			WHEN 0 THEN
				PERFORM nextval('failed_as_if_deadlocked');
				RAISE EXCEPTION 'as if deadlocked' USING ERRCODE = 'deadlock_detected';
			WHEN 1 THEN
				PERFORM nextval('failed_as_if_cancelled');
				RAISE EXCEPTION 'as if cancelled' USING ERRCODE = 'query_canceled';
			WHEN 2 THEN
				PERFORM nextval('failed_error');
				PERFORM 1 / (m.failing - m.failing);
			WHEN 3 THEN
				PERFORM nextval('failed_returned_null');
				RETURN NULL;
			ELSE
				PERFORM nextval('failed_returned_false');
				RETURN false;
		END CASE;
	END IF;
	RETURN true;
END $$;

-- Refuses at commit, now and then.
CREATE FUNCTION refuse_at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF random() < (SELECT failing / 50 FROM mood) THEN
		PERFORM nextval('failed_refused_at_commit');
		RAISE EXCEPTION 'refused at commit';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER refuse_at_commit AFTER INSERT OR UPDATE ON stored
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.buffer = 'wide')
EXECUTE FUNCTION refuse_at_commit();

-- As long as the gate is not there, who passes fails at commit.
CREATE TABLE gate (id int PRIMARY KEY);
INSERT INTO gate VALUES (1);
CREATE TABLE passed (id int REFERENCES gate DEFERRABLE INITIALLY DEFERRED);

-- what serializable transactions get in each other's way with
CREATE TABLE notes (id int, key text);

CREATE FUNCTION store_plainly(b text, keys text[], counts bigint[]) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO stored AS s
	SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n;
	RETURN in_the_mood(0.1);
END $$;

-- The same in an exception block, which sees what went wrong.
CREATE FUNCTION store(b text, keys text[], counts bigint[]) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
	result boolean;
BEGIN
	BEGIN
		PERFORM count(*) FROM notes WHERE key = ANY (keys);
		INSERT INTO stored AS s
		SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
		ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n;
	EXCEPTION
		WHEN deadlock_detected THEN PERFORM nextval('failed_deadlock'); RAISE;
		WHEN serialization_failure THEN PERFORM nextval('failed_serialization'); RAISE;
		WHEN lock_not_available THEN PERFORM nextval('failed_lock_timeout'); RAISE;
		WHEN query_canceled THEN PERFORM nextval('failed_cut_off'); RAISE;
	END;
	result := in_the_mood(1);

	-- A conflict that others make from here on shows only when it commits.
	IF current_setting('transaction_isolation') = 'serializable' THEN
		PERFORM pg_sleep(random() * 0.1);
	END IF;
	RETURN result;
END $$;
};

	$sql .= "CREATE SEQUENCE failed_$_;\n" foreach @failure_kinds;
	$sql .= "CREATE SEQUENCE begun_$_; CREATE SEQUENCE ended_$_;\n"
	  foreach 1 .. $nasync;
	$sql .= q{
-- the asynchronous increments at the last reckoning
CREATE TABLE attempts_seen AS SELECT k, 0::bigint AS begun, 0::bigint AS ended, 0::bigint AS n
FROM generate_series(1, } . $nasync . q{) AS k;
};
	$sql .= "$handler{$_};\n" foreach sort keys %handler;

	# three very hot keys; arrays, large batches
	$sql .= 'CREATE FOREIGN TABLE hot '
	  . buffer_sql('key text NOT NULL', 'store_hot', jitter => '50ms');

	# many keys, one a call, small batches
	$sql .= 'CREATE FOREIGN TABLE wide '
	  . buffer_sql(
		'key int NOT NULL', 'store_wide',
		interval => '200ms',
		backoff => '20ms',
		batch_size => '20');

	# keys of two columns, one of them null at times; arrays, very large
	# batches; the handler belongs to a group
	$sql .= 'CREATE FOREIGN TABLE pairs '
	  . buffer_sql(
		'a int NOT NULL, b text', 'public.store_pairs',
		interval => '150ms',
		backoff => '30ms',
		batch_size => '10000')
	  . 'ALTER FOREIGN TABLE pairs OWNER TO serializer;';

	# asynchronous increments; one a call, each in a transaction of its own
	$sql .= 'CREATE FOREIGN TABLE attempts '
	  . buffer_sql(
		'key text NOT NULL', 'store_attempts',
		interval => '50ms',
		backoff => '20ms',
		batch_size => '1',
		handler_timeout => '150ms')
	  . 'ALTER FOREIGN TABLE attempts OWNER TO keeper;';

	# what is stopped and started, renamed and truncated in transactions that
	# roll back
	$sql .= 'CREATE FOREIGN TABLE rough '
	  . buffer_sql(
		'key int NOT NULL', 'store_rough',
		shutdown => '500ms',
		timeout => '200ms')
	  . 'ALTER FOREIGN TABLE rough OWNER TO repeater;';

	# keys that are equal but not the same; passes the gate, and does not wait
	# for others
	$sql .= q{
CREATE FUNCTION store_merged(keys numeric[], counts bigint[]) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '50ms' AS $$
BEGIN
	IF cardinality(keys) <> (SELECT count(DISTINCT k) FROM unnest(keys) AS k) THEN
		RAISE EXCEPTION 'keys come twice: %', keys;
	END IF;
	INSERT INTO passed VALUES (1);
	RETURN store('merged', (SELECT array_agg(trim_scale(k)::text ORDER BY i) FROM unnest(keys) WITH ORDINALITY AS u (k, i)), counts);
END $$;
CREATE FOREIGN TABLE merged }
	  . buffer_sql('key numeric NOT NULL', 'store_merged')
	  . 'ALTER FOREIGN TABLE merged OWNER TO keeper;';

	# what is held for long, without a worker
	$sql .= q{
CREATE FUNCTION store_rare(keys text[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('rare', array_agg(coalesce(k, 'null')), array_agg(n)) FROM unnest(keys, counts) AS u (k, n) $$;
CREATE FOREIGN TABLE rare }
	  . buffer_sql('key text', 'store_rare',
		interval => '1h', jitter => '10min', timeout => '100ms');

	# what cannot be stored
	$sql .= q{
CREATE FUNCTION store_stuck(keys text[], counts bigint[]) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
	IF (SELECT stuck FROM mood) THEN
		RAISE EXCEPTION 'stuck';
	END IF;
	RETURN store('stuck', keys, counts);
END $$;
CREATE FOREIGN TABLE stuck }
	  . buffer_sql('key text NOT NULL', 'store_stuck', shutdown => '200ms');

	# The key's type changes and changes back, so it is compared only in the
	# end; there is a handler for either type.
	$sql .= q{
CREATE FUNCTION store_shifty(keys int[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('shifty', keys::text[], counts) $$;
CREATE FUNCTION store_shifty(keys bigint[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('shifty', keys::text[], counts) $$;
CREATE FOREIGN TABLE shifty }
	  . buffer_sql('key int NOT NULL', 'store_shifty');

	# What fails is discarded: stored is no more than was counted.
	$sql .= q{
CREATE FUNCTION store_once(key int, count bigint) RETURNS boolean
LANGUAGE sql AS $$ SELECT store_plainly('once', ARRAY[key::text], ARRAY[count]) $$;
CREATE FOREIGN TABLE once }
	  . buffer_sql('key int NOT NULL', 'store_once', restart => 'temporary');

	# comes and goes, and is not compared
	$sql .= q{
CREATE FUNCTION store_fleeting(key int, count bigint) RETURNS void LANGUAGE sql AS '';
};

	# one of them is renamed
	$sql .= "CREATE TABLE names AS SELECT name, name::regclass::oid AS relid FROM unnest(ARRAY["
	  . join(', ', map { "'$_'" } @exact_buffers)
	  . "]) AS name;\n";
	$sql .= "CREATE VIEW held AS\n"
	  . q{SELECT 'hot' AS buffer, key, n FROM hot
UNION ALL SELECT 'wide', key::text, n FROM wide
UNION ALL SELECT 'pairs', a || ' ' || coalesce(b, 'null'), n FROM pairs
UNION ALL SELECT 'attempts', key, n FROM attempts
UNION ALL SELECT 'rough', key::text, n FROM rough
UNION ALL SELECT 'merged', trim_scale(key)::text, n FROM merged
UNION ALL SELECT 'rare', coalesce(key, 'null'), n FROM rare
UNION ALL SELECT 'stuck', key, n FROM stuck;
};

	$sql .= q{
-- Counts a key three times, each within an exception block that may fail.
CREATE FUNCTION count_with_exceptions(k int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 3 LOOP
		BEGIN
			PERFORM sb_increment(k, i, 'wide');
			INSERT INTO ledger VALUES ('wide', k, i);
			BEGIN
				PERFORM sb_increment('exceptions', 1, 'hot');
				INSERT INTO ledger VALUES ('hot', 'exceptions', 1);
				IF random() < 0.3 THEN
					RAISE EXCEPTION 'inner';
				END IF;
			EXCEPTION WHEN raise_exception THEN
				PERFORM sb_increment('caught', 1, 'hot');
				INSERT INTO ledger VALUES ('hot', 'caught', 1);
			END;
			IF random() < 0.3 THEN
				PERFORM 1 / (i - i);
			END IF;
		EXCEPTION WHEN division_by_zero THEN
			NULL;
		END;
	END LOOP;
END $$;

-- Commits and rolls back in a loop.
CREATE PROCEDURE count_in_transactions(k int) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 4 LOOP
		PERFORM sb_increment(ROW(k, 'procedure'), i, 'pairs');
		INSERT INTO ledger VALUES ('pairs', k || ' procedure', i);
		IF i % 2 = 0 THEN
			ROLLBACK;
		ELSE
			COMMIT;
		END IF;
	END LOOP;
END $$;

-- Is what the transaction sees of its own increments what it has done?  That
-- of a key which only this session counts.
CREATE FUNCTION count_and_look(session int) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
	k text := 'session ' || session;
	before bigint;
	after bigint;
BEGIN
	-- some of what there was, or all, may be stored in between, but not ours
	before := coalesce(sb_count(k, 'hot'), 0);
	PERFORM sb_increment(k, 5, 'hot');
	after := sb_count(k, 'hot');
	IF after IS NULL OR after NOT BETWEEN 5 AND before + 5 THEN
		RAISE EXCEPTION 'sb_count was %, and is % after 5 more', before, after;
	END IF;
	INSERT INTO ledger VALUES ('hot', k, 5);
END $$;

-- Counts when the transaction commits.
CREATE TABLE late (key int, n int);
CREATE FUNCTION count_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM sb_increment(NEW.key, NEW.n, 'wide'), sb_increment('late', 1, 'rare');
	INSERT INTO ledger VALUES ('wide', NEW.key, NEW.n), ('rare', 'late', 1);
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER count_late AFTER INSERT ON late
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION count_late();

-- what rough sessions collide on
CREATE TABLE doors (id int PRIMARY KEY, n int);
INSERT INTO doors SELECT g, 0 FROM generate_series(1, 10) AS g;
};
	return $sql;
}

# To be run in one transaction, with nothing before it.  Returns the keys that
# are off: what the ledger says, what is stored and what is held.  And for each
# buffer, in lines that begin with "=", what was stored other than its
# statistics say, which may only change when the statistics begin anew.
#
# The ledger is added up and emptied while it is locked, so that looking at it
# does not take longer and longer.
sub balance_sql
{
	return q{
SET LOCAL deadlock_timeout = '30s';
SET LOCAL statement_timeout = '180s';
LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE;
LOCK TABLE stored IN EXCLUSIVE MODE;
INSERT INTO books AS b SELECT buffer, key, sum(n), count(*) FROM ledger GROUP BY 1, 2
ON CONFLICT (buffer, key) DO UPDATE SET n = b.n + EXCLUDED.n, entries = b.entries + EXCLUDED.entries;
TRUNCATE ledger;
CREATE TEMP TABLE held_now ON COMMIT DROP AS SELECT buffer, key, sum(n) AS n FROM held GROUP BY 1, 2;
SELECT buffer || ' ' || key || ': ledger ' || coalesce(b.n, 0) || ', stored ' || coalesce(s.n, 0) || ', held ' || coalesce(h.n, 0)
FROM (SELECT * FROM books WHERE buffer NOT IN ('once', 'shifty')) b
	FULL JOIN (SELECT * FROM stored WHERE buffer NOT IN ('once', 'shifty', 'attempts')) s USING (buffer, key)
	FULL JOIN (SELECT * FROM held_now WHERE buffer <> 'attempts') h USING (buffer, key)
WHERE coalesce(b.n, 0) <> coalesce(s.n, 0) + coalesce(h.n, 0)
ORDER BY 1;

-- of these, nothing may be stored that was not counted
SELECT 'once ' || key || ': ledger ' || coalesce(b.n, 0) || ', stored ' || s.n
FROM stored s LEFT JOIN books b USING (buffer, key)
WHERE buffer = 'once' AND s.n > coalesce(b.n, 0) ORDER BY 1;

-- as for asynchronous increments since the last time
CREATE TEMP TABLE attempts_now ON COMMIT DROP AS
SELECT k,
	coalesce(pg_sequence_last_value(('begun_' || k)::regclass), 0) AS begun,
	coalesce(pg_sequence_last_value(('ended_' || k)::regclass), 0) AS ended,
	coalesce((SELECT n FROM stored WHERE buffer = 'attempts' AND key = k::text), 0) +
		coalesce((SELECT n FROM held_now WHERE buffer = 'attempts' AND key = k::text), 0) AS n
FROM attempts_seen;
SELECT 'attempts ' || k || ': begun ' || now.begun - seen.begun || ', ended ' || now.ended - seen.ended || ', stored or held ' || now.n - seen.n
FROM attempts_now now JOIN attempts_seen seen USING (k)
WHERE now.n - seen.n NOT BETWEEN now.ended - seen.ended AND now.begun - seen.begun;

-- the statistics
SELECT name || ': pending and in flight ' || pending + in_flight || ', held ' || coalesce(sum(n), 0)
FROM names JOIN sb_stat_buffers s USING (relid) LEFT JOIN held_now h ON h.buffer = name
GROUP BY name, pending, in_flight HAVING pending + in_flight <> coalesce(sum(n), 0);
SELECT '=' || name || ' ' || coalesce(sum(n), 0) - flushed_count
FROM names JOIN sb_stat_buffers s USING (relid) LEFT JOIN stored h ON h.buffer = name
GROUP BY name, flushed_count ORDER BY 1;
UPDATE attempts_seen seen SET begun = now.begun, ended = now.ended, n = now.n
FROM attempts_now now WHERE now.k = seen.k;
};
}

# How many asynchronous increments there were, and of how many it is not known
# whether they were done, because the session was cut off in the middle.
sub doubtful_sql
{
	return 'SELECT sum(n), sum(begun - ended) FROM attempts_seen';
}

1;

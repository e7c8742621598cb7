
# Copyright (c) 2026, statbuffer developers

# A soak: sessions count in every way there is, with rollbacks, savepoints and
# errors; handlers fail at random; definitions change; processes are cancelled
# and terminated.  In the end each key's sum must be exact.
#
# What a transaction counts it also writes to a ledger, so the ledger has what
# was committed.  Asynchronous increments do not depend on the transaction, so
# what they should add up to is known in other ways; see below.
#
# STATBUFFER_SOAK_SECONDS says how long it takes.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use IPC::Run;
use Test::More;
use Time::HiRes qw(time usleep);

my $seconds = $ENV{STATBUFFER_SOAK_SECONDS} || 60;

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
max_connections = 50
max_worker_processes = 16
shared_buffers = 128MB
max_wal_size = 4GB
deadlock_timeout = 100ms
log_statement = none
log_min_messages = log
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql(
	q{
CREATE EXTENSION statbuffer;

-- append-only: what was committed
CREATE UNLOGGED TABLE ledger (buffer text, key text, n bigint);
CREATE UNLOGGED TABLE stored (buffer text, key text, n bigint, PRIMARY KEY (buffer, key))
WITH (fillfactor = 50);

-- how handlers feel: the probability of each way to fail
CREATE TABLE mood (failing float8, slow float8);
INSERT INTO mood VALUES (0.05, 0.01);

-- Fails now and then, in one of several ways; false is one of them.
CREATE FUNCTION in_the_mood() RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	m mood;
BEGIN
	SELECT * INTO m FROM mood;
	IF random() < m.slow THEN
		PERFORM pg_sleep(random() * 0.2);
	END IF;
	IF random() < m.failing THEN
		CASE floor(random() * 5)::int
			WHEN 0 THEN RAISE EXCEPTION 'not in the mood';
			WHEN 1 THEN RAISE EXCEPTION 'as if deadlocked' USING ERRCODE = 'deadlock_detected';
			WHEN 2 THEN RAISE EXCEPTION 'as if cancelled' USING ERRCODE = 'query_canceled';
			WHEN 3 THEN PERFORM 1 / (m.failing - m.failing);
			ELSE RETURN false;
		END CASE;
	END IF;
	RETURN true;
END $$;

-- Refuses at commit, now and then.
CREATE FUNCTION refuse_at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF random() < (SELECT failing / 50 FROM mood) THEN
		RAISE EXCEPTION 'refused at commit';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER refuse_at_commit AFTER INSERT OR UPDATE ON stored
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.buffer = 'wide')
EXECUTE FUNCTION refuse_at_commit();

CREATE FUNCTION store(b text, keys text[], counts bigint[]) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO stored AS s
	SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n;
	RETURN in_the_mood();
END $$;

-- three very hot keys; arrays, large batches
CREATE FUNCTION store_hot(keys text[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('hot', keys, counts) $$;
CREATE FOREIGN TABLE hot (key text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_hot', interval '100ms', jitter '50ms', backoff '50ms');

-- many keys, one a call, small batches
CREATE FUNCTION store_wide(key int, count bigint) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('wide', ARRAY[key::text], ARRAY[count]) $$;
CREATE FOREIGN TABLE wide (key int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_wide', interval '200ms', backoff '20ms', batch_size '20', timeout '1s');

-- keys of two columns, one of them null at times; arrays, very large batches
CREATE FUNCTION store_pairs(a int[], b text[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$
	SELECT store('pairs', array_agg(x || ' ' || coalesce(y, 'null')), array_agg(z))
	FROM unnest(a, b, counts) AS u (x, y, z)
$$;
CREATE FOREIGN TABLE pairs (a int NOT NULL, b text, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_pairs', interval '150ms', backoff '30ms', batch_size '10000');

-- asynchronous increments; one a call, each in a transaction of its own
CREATE FUNCTION store_attempts(key text, count bigint) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('attempts', ARRAY[key], ARRAY[count]) $$;
CREATE FOREIGN TABLE attempts (key text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_attempts', interval '50ms', backoff '20ms', batch_size '1', handler_timeout '150ms');
CREATE SEQUENCE attempts_undone;
CREATE SEQUENCE attempts_begun;
CREATE SEQUENCE attempts_ended;

-- what is cancelled and terminated, stopped and started counts here
CREATE FUNCTION store_rough(keys int[], counts bigint[]) RETURNS boolean
LANGUAGE sql AS $$ SELECT store('rough', keys::text[], counts) $$;
CREATE FOREIGN TABLE rough (key int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_rough', interval '100ms', backoff '50ms', shutdown '500ms', timeout '200ms');

-- comes and goes, and is not reconciled
CREATE FUNCTION store_fleeting(key int, count bigint) RETURNS void LANGUAGE sql AS '';

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
});

#
# The load: sessions that are left alone
#

my %script = (
	hot => [
		10, q{
\set k random(1, 3)
BEGIN;
SELECT sb_increment('hot ' || :k, 1, 'hot');
INSERT INTO ledger VALUES ('hot', 'hot ' || :k, 1);
COMMIT;
}
	],
	wide => [
		10, q{
\set k random(1, 10000)
\set n random(-3, 9)
BEGIN;
SELECT sb_increment(:k, :n, 'wide');
INSERT INTO ledger VALUES ('wide', :k, :n);
COMMIT;
}
	],
	savepoints => [
		5, q{
\set a random(1, 100)
\set b random(1, 100)
\set c random(1, 10000)
BEGIN;
INSERT INTO pairs VALUES (:a, 'x', 2);
SAVEPOINT one;
SELECT sb_increment(ROW(:b, 'x'), 1, 'pairs'), sb_increment(:c, 1, 'wide');
SAVEPOINT two;
SELECT sb_increment(ROW(:a, 'x'), 100, 'pairs'), sb_increment('undone', 1, 'hot');
ROLLBACK TO two;
SELECT sb_increment(ROW(:a, NULL::text), 3, 'pairs');
RELEASE one;
SAVEPOINT three;
SELECT sb_increment(:c, 1000, 'wide');
ROLLBACK TO three;
INSERT INTO ledger VALUES
	('pairs', :a || ' x', 2), ('pairs', :b || ' x', 1), ('wide', :c, 1), ('pairs', :a || ' null', 3);
COMMIT;
}
	],
	rollback => [
		3, q{
\set k random(1, 10000)
BEGIN;
SELECT sb_increment('hot 1', 1000000, 'hot'), sb_increment(:k, 1000000, 'wide');
INSERT INTO ledger VALUES ('hot', 'hot 1', 1000000), ('wide', :k, 1000000);
ROLLBACK;
}
	],
	exceptions => [
		3, q{
\set k random(1, 10000)
SELECT count_with_exceptions(:k);
}
	],
	procedure => [
		2, q{
\set k random(1, 50)
CALL count_in_transactions(:k);
}
	],
	look => [
		3, q{
SELECT count_and_look(:client_id);
}
	],
	select => [
		1, q{
\set first random(1, 9000)
\set size random(1, 1000)
\set n random(-1, 5)
BEGIN;
INSERT INTO wide SELECT g, :n FROM generate_series(:first, :first + :size) AS g;
INSERT INTO ledger SELECT 'wide', g, :n FROM generate_series(:first, :first + :size) AS g;
COMMIT;
}
	],

	# Those that commit have a row of the ledger; those that do not are
	# counted by a sequence, which no rollback undoes either.
	async => [
		4, q{
\set k random(1, 20)
BEGIN;
SELECT sb_async_increment('kept ' || :k, 1, 'attempts');
INSERT INTO ledger VALUES ('attempts', 'kept ' || :k, 1);
COMMIT;
}
	],
	async_undone => [
		4, q{
BEGIN;
SELECT sb_async_increment('undone', 1, 'attempts'), nextval('attempts_undone');
ROLLBACK;
}
	]);

my @command = (
	$node->installed_command('pgbench'), '-n', '-M', 'simple', '-c', '8', '-j',
	'2', '-T', $seconds, '--max-tries=1000', '-h', $node->host, '-p', $node->port);
foreach my $name (sort keys %script)
{
	my $file = $node->basedir . "/$name.sql";

	append_to_file($file, $script{$name}[1]);
	push @command, '-f', "$file\@$script{$name}[0]";
}

#
# The load: sessions to which things happen
#

# Long scripts for psql, which goes on with the next transaction after an
# error.  A transaction that fails has no row in the ledger either.
sub rough_script
{
	my ($file) = @_;
	my $text = "SET application_name = 'rough';\n";

	foreach (1 .. 3000)
	{
		my $k = 1 + int rand 200;
		my $n = 1 + int rand 9;
		my $way = int rand 6;

		if ($way == 0)
		{
			$text .= "BEGIN; SELECT sb_increment($k, $n, 'rough');"
			  . " INSERT INTO ledger VALUES ('rough', $k, $n); COMMIT;\n";
		}
		elsif ($way == 1)
		{
			# many keys, so that publishing takes time
			$text .=
			  "WITH l AS (INSERT INTO ledger SELECT 'rough', g, $n FROM generate_series($k, $k + 300) AS g RETURNING key, n)"
			  . " INSERT INTO rough SELECT key::int, n FROM l;\n";
		}
		elsif ($way == 2)
		{
			$text .= "BEGIN; SELECT sb_increment($k, $n, 'rough'); SAVEPOINT s;"
			  . " SELECT sb_increment($k, 1000, 'rough'), pg_sleep(random() * 0.01); ROLLBACK TO s;"
			  . " INSERT INTO ledger VALUES ('rough', $k, $n); COMMIT;\n";
		}
		elsif ($way == 3)
		{
			# Begun before, ended after: the truth is in between.  In one
			# statement, because psql would go on after the first of two.
			$text .= "SELECT nextval('attempts_begun'),"
			  . " sb_async_increment('rough', 1, 'attempts'), nextval('attempts_ended');\n";
		}
		elsif ($way == 4)
		{
			$text .= "SELECT sb_increment($k, 1, 'fleeting');\n";
		}
		else
		{
			$text .= "SELECT count(*), sum(n) FROM rough;"
			  . " SELECT sb_count($k, 'rough'); SELECT count(*) FROM sb_keys('rough');\n";
		}
	}
	append_to_file($file, $text);
	return;
}

my %rough;
my $rough_sessions = 0;

sub start_rough
{
	my ($i) = @_;
	my $file = $node->basedir . "/rough$i.sql";

	rough_script($file) if !-e $file;
	$rough{$i} = {};
	$rough{$i}{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-d', $node->connstr('postgres'), '-f', $file
		],
		'<' => '/dev/null',
		'>' => '/dev/null',
		'2>' => '/dev/null');
	$rough_sessions++;
	return;
}

#
# What happens to them
#

my %done = (
	'workers terminated' => 0,
	'workers cancelled' => 0,
	'launchers terminated' => 0,
	'launchers cancelled' => 0,
	'sessions terminated' => 0,
	'sessions cancelled' => 0);

# Does something to at most one process of a kind.
sub strike
{
	my ($what, $function, $condition) = @_;

	$done{$what} += sql(
		"SELECT count(*) FILTER (WHERE $function(pid))
		 FROM (SELECT pid FROM pg_stat_activity WHERE $condition ORDER BY random() LIMIT 1) p"
	);
	return;
}

# Runs what may fail, and counts what did not.
sub try
{
	my ($what, $statement) = @_;
	my ($status) = $node->psql('postgres', $statement);

	$done{$what}++ if $status == 0;
	$done{"$what (refused)"}++ if $status != 0;
	return;
}

my @buffers = qw(hot wide pairs attempts rough);

sub random_buffer { return $buffers[ int rand @buffers ]; }

my $is_worker = "backend_type = 'statbuffer worker'";
my $is_launcher = "backend_type = 'statbuffer launcher'";
my $is_rough = "application_name = 'rough'";

# Each with how often it happens, in relation to the others.
my @events = (
	[ 10, sub { strike('workers terminated', 'pg_terminate_backend', $is_worker) } ],
	[ 10, sub { strike('workers cancelled', 'pg_cancel_backend', $is_worker) } ],

	[ 3, sub { strike('launchers cancelled', 'pg_cancel_backend', $is_launcher) } ],
	[ 20, sub { strike('sessions cancelled', 'pg_cancel_backend', $is_rough) } ],
	[ 10, sub { strike('sessions terminated', 'pg_terminate_backend', $is_rough) } ],
	[
		10,
		sub {
			try('intervals changed',
					'ALTER FOREIGN TABLE '
				  . random_buffer()
				  . " OPTIONS (SET interval '"
				  . (50 + int rand 150)
				  . "ms')");
		}
	],
	[ 5, sub { try('flushes asked for', "SELECT sb_flush_all('" . random_buffer() . "')") } ],
	[
		5,
		sub {
			try('flushes asked for',
				"SELECT sb_flush(g, 'wide'), sb_flush('hot ' || g % 4, 'hot')
				 FROM generate_series(1, 100) AS g");
		}
	],
	[
		5,
		sub {
			try('drains', "SELECT sb_drain('" . random_buffer() . "', '1s')");
		}
	],
	[
		5,
		sub {
			try('drains cut off',
				"SET statement_timeout = '20ms'; SELECT sb_drain('"
				  . random_buffer()
				  . "')");
		}
	],
	[
		3,
		sub {
			try('buffers stopped', "SELECT sb_stop('rough')");
			try('buffers started', "SELECT sb_start('rough')");
		}
	],
	[
		3,
		sub {
			try('buffers dropped', 'DROP FOREIGN TABLE fleeting');
			try('buffers made',
				"CREATE FOREIGN TABLE fleeting (key int NOT NULL, n bigint NOT NULL)
				 SERVER statbuffer OPTIONS (handler 'store_fleeting', interval '"
				  . (int rand 2000)
				  . "ms')");
		}
	],
	[ 2, sub { try('buffers truncated', 'TRUNCATE fleeting') } ],
	[ 5, sub { sql('TABLE sb_stat_buffers') } ]);
my $weight = 0;
$weight += $_->[0] foreach @events;

# A seed that can be given again brings the same events, if not the same order
# of everything.
my $seed = $ENV{STATBUFFER_SOAK_SEED} || int(time);
srand $seed;
note("$seconds seconds, STATBUFFER_SOAK_SEED=$seed");

my $load_out = '';
my $load_err = '';
my $load = IPC::Run::start([ @command, 'postgres' ],
	'<' => \undef, '>' => \$load_out, '2>' => \$load_err);
my $started = time;
my $strike_launcher = $started + 5;
while (time < $started + $seconds)
{
	# It comes back after five seconds, and flushes go on for some more.
	if (time >= $strike_launcher)
	{
		strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
		$strike_launcher += 20;
	}

	foreach my $i (1 .. 3)
	{
		next if exists $rough{$i} && $rough{$i}{run}->pumpable;
		$rough{$i}{run}->finish if exists $rough{$i};
		start_rough($i);
	}

	my $draw = rand $weight;
	foreach my $event (@events)
	{
		$draw -= $event->[0];
		next if $draw > 0;
		$event->[1]->();
		last;
	}
	usleep(50_000);
}

ok($load->finish, 'no session that was left alone met an error');
diag($load_err) if $load_err =~ /error|abort/i;
unlike($load_err, qr/aborted/, 'none of them was aborted');
sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $is_rough");
$_->{run}->finish foreach values %rough;
$node->poll_query_until('postgres',
	"SELECT count(*) FROM pg_stat_activity WHERE $is_rough", '0')
  or die 'sessions do not end';

#
# Peace, and the reckoning
#

# What the handlers' failures have left is stored with all the rest.
sql("UPDATE mood SET failing = 0, slow = 0");
sql("SELECT sb_start('rough')");
foreach my $buffer (@buffers)
{
	is(sql("SELECT sb_drain('$buffer', '180s')"), 't', "$buffer is drained");
}

# Asynchronous increments of sessions that were left alone and rolled back
sql(
	"INSERT INTO ledger SELECT 'attempts', 'undone', last_value FROM attempts_undone WHERE is_called"
);

# Those of sessions that were cut off are known within a few
my ($begun, $ended, $rough_async) = split /\|/,
  sql(
	"SELECT b.last_value, e.last_value,
	 coalesce((SELECT n FROM stored WHERE buffer = 'attempts' AND key = 'rough'), 0)
	 FROM attempts_begun b, attempts_ended e");
cmp_ok($rough_async, '<=', $begun,
	'asynchronous increments of sessions that were cut off: not too many');
cmp_ok($rough_async, '>=', $ended, 'and not too few');
sql(
	"INSERT INTO ledger SELECT buffer, key, n FROM stored WHERE buffer = 'attempts' AND key = 'rough'"
);

# For each key: what was committed is what was stored and what is held
my $held = q{
SELECT 'hot' AS buffer, key, n FROM hot
UNION ALL SELECT 'wide', key::text, n FROM wide
UNION ALL SELECT 'pairs', a || ' ' || coalesce(b, 'null'), n FROM pairs
UNION ALL SELECT 'attempts', key, n FROM attempts
UNION ALL SELECT 'rough', key::text, n FROM rough};
is(sql("SELECT count(*) FROM ($held) h"),
	'0', 'nothing is held after the drains');
is( sql(
		"SELECT buffer, key, l.n AS ledger, s.n AS stored
		 FROM (SELECT buffer, key, sum(n) AS n FROM ledger GROUP BY 1, 2) l
		 FULL JOIN (SELECT buffer, key, sum(n) AS n
			FROM (SELECT * FROM stored UNION ALL $held) t GROUP BY 1, 2) s USING (buffer, key)
		 WHERE coalesce(l.n, 0) <> coalesce(s.n, 0)
		 ORDER BY 1, 2 LIMIT 20"),
	'',
	'each key has what the ledger says, to the last one');
is( sql("SELECT count(*) FROM stored WHERE key = 'undone' AND buffer = 'hot'"),
	'0', 'nothing that was rolled back is stored');

# The view agrees.
is( sql(
		"SELECT buffer, keys >= 0, pending, in_flight, discarded,
		 flushed_count = (SELECT sum(n) FROM stored s WHERE s.buffer = b.buffer::text)
		 FROM sb_stat_buffers b WHERE buffer::text <> 'fleeting' ORDER BY buffer::text"),
	join("\n", map { "$_|t|0|0|0|t" } sort @buffers),
	'the statistics agree');
is( sql(
		"SELECT count(*) FROM sb_stat_buffers WHERE state NOT IN ('running', 'idle') AND buffer::text <> 'fleeting'"
	),
	'0',
	'no buffer fails any more');
is(sql("SELECT count(*) FROM sb_keys('wide') WHERE failures > 0 OR last_error IS NOT NULL"),
	'0', 'nor does any key');

# It counts as ever.
sql("SELECT sb_increment(k, 1, 'wide') FROM generate_series(1, 100) AS k");
is(sql("SELECT sb_drain('wide', '180s')"), 't', 'counting goes on');

my ($transactions) = $load_out =~ /transactions actually processed: (\d+)/;
note(   "$transactions transactions of sessions that were left alone, "
	  . "$rough_sessions sessions that were not");
note($_) foreach split /\n/, sql(
	"SELECT buffer || ': ' || increments || ' increments, ' || flushed_keys || ' keys stored in '
	 || handler_calls || ' calls, ' || failures || ' failures' FROM sb_stat_buffers ORDER BY 1");
note("$_: $done{$_}") foreach sort keys %done;
note('ledger: ' . sql("SELECT count(*) || ' rows' FROM ledger"));

my $log = slurp_file($node->logfile);
unlike(
	$log,
	qr/PANIC|TRAP|was terminated by signal|all server processes terminated/,
	'the server never crashed');
foreach my $what ('workers terminated', 'workers cancelled',
	'launchers terminated', 'sessions cancelled', 'sessions terminated')
{
	cmp_ok($done{$what}, '>', 0, "there were $what: $done{$what}");
}

$node->stop('fast');

done_testing();

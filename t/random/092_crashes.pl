# Durable buffers under load and crashes: sessions count in every way, in
# transactions that write the same into a table, the book, or prepare both; some
# roll back.  Processes are killed, the server is shut down immediately, buffers are
# switched off and on and altered, and the ledger is rotated all the time.  After
# each crash, and in the end, what is stored and held of each key must be what the
# book has.
#
# STATBUFFER_CRASHES_ROUNDS and STATBUFFER_CRASHES_SEED in the environment choose
# how many crashes there are, and which.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin, "$FindBin::RealBin/..";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $rounds = $ENV{STATBUFFER_CRASHES_ROUNDS} // 8;
my $seed = $ENV{STATBUFFER_CRASHES_SEED} // int time;
my $db = 'postgres';

srand $seed;
note("$rounds rounds, STATBUFFER_CRASHES_SEED=$seed");

my $node = PostgreSQL::Test::Cluster->new('crashes');
$node->init;
$node->append_conf('postgresql.conf', qq{
max_prepared_transactions = 50
max_worker_processes = 20
statbuffer.ledger_size = 1MB
checkpoint_timeout = 30s
log_line_prefix = '%m [%p] %b %q%a '
log_min_messages = warning
});
$node->start;
$node->safe_psql($db, q{
CREATE EXTENSION statbuffer;
CREATE TABLE book (buffer text, key text, n bigint);
CREATE TABLE target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 'target', 'n', 'durable=true', 'interval=300ms', 'jitter=300ms');
CREATE TABLE stored (key text PRIMARY KEY, n bigint NOT NULL);
CREATE FUNCTION store(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO stored AS s SELECT * FROM unnest(keys, counts)
	ON CONFLICT (key) DO UPDATE SET n = s.n + EXCLUDED.n
$$;
CREATE FOREIGN TABLE handled (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '50ms', durable 'true', batch_size '20');
CREATE VIEW books AS
	SELECT buffer, key, coalesce(sum(booked), 0) AS booked, coalesce(sum(counted), 0) AS counted FROM (
		SELECT buffer, key, n AS booked, NULL AS counted FROM book
		UNION ALL SELECT 'hits', key, NULL, n FROM target
		UNION ALL SELECT 'hits', key, NULL, n FROM hits
		UNION ALL SELECT 'handled', key, NULL, n FROM stored
		UNION ALL SELECT 'handled', key, NULL, n FROM handled) AS all_of_them
	GROUP BY buffer, key;
});

my @scripts = (
	q{
\set k random(1, 200)
\set n random(1, 5)
BEGIN;
INSERT INTO book VALUES ('hits', 'key ' || :k, :n), ('handled', 'key ' || :k, 1);
SELECT sb_increment('key ' || :k, :n, 'hits');
INSERT INTO handled VALUES ('key ' || :k, 1);
COMMIT;
}, q{
\set k random(1, 200)
BEGIN;
SAVEPOINT a;
INSERT INTO hits VALUES ('key ' || :k, 100);
ROLLBACK TO a;
INSERT INTO hits VALUES ('key ' || :k, -1), ('more ' || :k, 3);
INSERT INTO book VALUES ('hits', 'key ' || :k, -1), ('hits', 'more ' || :k, 3);
COMMIT;
}, q{
\set k random(1, 200)
BEGIN;
INSERT INTO book VALUES ('hits', 'key ' || :k, 7);
INSERT INTO hits VALUES ('key ' || :k, 7);
ROLLBACK;
}, q{
\set k random(1, 200)
\set c random(1, 1000000000)
BEGIN;
INSERT INTO book VALUES ('handled', 'key ' || :k, 2);
INSERT INTO handled VALUES ('key ' || :k, 2);
PREPARE TRANSACTION 't:c';
COMMIT PREPARED 't:c';
}, q{
\set k random(1, 20)
BEGIN;
INSERT INTO book SELECT 'hits', 'bulk ' || i, 1 FROM generate_series(1, 500) AS i;
INSERT INTO hits SELECT 'bulk ' || i, 1 FROM generate_series(1, 500) AS i;
COMMIT;
});

# What is disturbed meanwhile, besides the crash.
my @disturbances = (
	q{ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false'); ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true')},
	q{BEGIN; ALTER FOREIGN TABLE handled OPTIONS (SET durable 'false'); ALTER FOREIGN TABLE handled OPTIONS (SET durable 'true'); COMMIT},
	q{ALTER FOREIGN TABLE handled ALTER COLUMN key TYPE varchar(100)},
	q{ALTER FOREIGN TABLE handled ALTER COLUMN key TYPE text},
	q{SELECT sb_drain('hits', '2s')},
	q{VACUUM FREEZE},
	q{SELECT count(*) FROM hits},
	q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'});

# Ends the server, or all of its processes, without a warning.
sub crash
{
	my $kind = int rand 4;
	my $what = $kind == 1 ? q{backend_type = 'client backend' AND pid <> pg_backend_pid()}
	  : $kind == 2 ? q{backend_type = 'statbuffer worker'}
	  : q{backend_type LIKE 'statbuffer%'};

	if ($kind > 0)
	{
		my ($status, $pid) = $node->psql($db,
			"SELECT pid FROM pg_stat_activity WHERE $what ORDER BY random() LIMIT 1");
		if (defined $pid && $pid =~ /^\d+$/ && kill 'KILL', $pid)
		{
			# restart_after_crash is off in tests
			usleep 300_000;
			$node->stop('immediate', fail_ok => 1);
			return "killed $pid, $what";
		}
	}
	$node->stop('immediate');
	return 'immediate shutdown';
}

# Nobody counts now: what is prepared is ended, and what each key has must be what
# is in the book.
sub check
{
	my ($when) = @_;

	foreach my $name (split /\n/, $node->safe_psql($db, 'SELECT gid FROM pg_prepared_xacts'))
	{
		my $how = rand() < 0.5 ? 'COMMIT' : 'ROLLBACK';
		$node->safe_psql($db, "$how PREPARED '$name'");
	}
	my $off = 'SELECT count(*) FROM books WHERE booked <> counted';
	# a flush may be between the two that are compared
	my $exact = $node->poll_query_until($db, $off, '0');
	ok($exact, "$when: every key is exact")
	  or diag($node->safe_psql($db, 'SELECT * FROM books WHERE booked <> counted LIMIT 20; TABLE sb_stat_buffers'));
	return $exact;
}

for my $round (1 .. $rounds)
{
	my @loads = map { start_load($node, $_, '-c', 2, '-T', 20) } @scripts;

	for (1 .. 1 + int rand 4)
	{
		usleep 100_000 + int rand 400_000;
		$node->psql($db, "SET lock_timeout = '2s'; " . $disturbances[ rand @disturbances ]);
	}
	my $how = crash();
	$_->{run}->finish foreach @loads;
	$node->append_conf('postgresql.conf',
		"shared_preload_libraries = '" . (rand() < 0.7 ? 'statbuffer' : '') . "'");
	$node->start;
	last if !check("round $round, $how");
}

for my $buffer ('hits', 'handled')
{
	is($node->safe_psql($db, "SELECT sb_drain('$buffer', '1min')"), 't', "$buffer is drained");
}
is($node->safe_psql($db, 'SELECT (SELECT count(*) FROM hits) + (SELECT count(*) FROM handled)'), 0, 'nothing is held');
check('in the end');
cmp_ok($node->safe_psql($db, 'SELECT count(*) FROM book'), '>', 1000, 'a lot was counted');
$node->stop('immediate');
$node->start;
is($node->safe_psql($db, 'SELECT (SELECT count(*) FROM hits) + (SELECT count(*) FROM handled)'), 0,
	'after another crash, nothing comes back');
$node->stop;
is(lines_in_log($node, qr/PANIC|TRAP|in the ledger/), 0, 'nothing else went wrong');
done_testing();

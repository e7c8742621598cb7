# Clients behind poolers: PgBouncer in transaction pooling, and Pgpool, which
# sends statements that only read to a standby.  070_pooling has what concerns
# PgBouncer and no client in particular.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my ($pgbouncer) = programs('pgbouncer');
my ($pgpool) = programs('pgpool');

plan skip_all => 'neither pgbouncer nor pgpool2 is installed' unless $pgbouncer || $pgpool;

my $node = client_node('pooled', "wal_level = replica\nmax_wal_senders = 5");
my %environment = client_environment();
my @poolers;

# Starts a pooler, which is ready when its socket is there.
sub start_pooler
{
	my ($name, $port, @command) = @_;
	my $log = $node->basedir . "/$name.log";
	my $run = IPC::Run::start(\@command, '<' => \undef, '>' => $log, '2>&1');

	push @poolers, $run;
	foreach (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return if -S $node->host . "/.s.PGSQL.$port";
		last unless $run->pumpable;
		select undef, undef, undef, 0.1;
	}
	BAIL_OUT("$name did not start: " . slurp_file($log));
}

sub stop_poolers
{
	foreach my $run (splice @poolers)
	{
		$run->signal('TERM');
		$run->finish;
	}
}

# However the test ends, they end.
END
{
	my $status = $?;

	stop_poolers();
	$? = $status;
}

# --- PgBouncer --------------------------------------------------------------

# Two connections to the server, and for each transaction another one, maybe.
SKIP:
{
	skip 'pgbouncer is not installed', 1 unless $pgbouncer;

	my $base = $node->basedir . '/pgbouncer';
	my $port = PostgreSQL::Test::Cluster::get_free_port();

	append_to_file("$base.users", qq{"shop" "$environment{PGPASSWORD}"\n});
	append_to_file("$base.ini", qq{
[databases]
shop = host=@{[ $node->host ]} port=@{[ $node->port ]} pool_size=2
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $port
unix_socket_dir = @{[ $node->host ]}
auth_type = scram-sha-256
auth_file = $base.users
pool_mode = transaction
ignore_startup_parameters = extra_float_digits
logfile = $base.log
pidfile = $base.pid
});
	chmod 0600, "$base.users";
	start_pooler('pgbouncer', $port, $pgbouncer, '-q', "$base.ini");

	# Statements that are prepared by a name stay with a connection, and so this
	# version of PgBouncer cannot have them: POOLED has the programs do without.
	my %pooled = (client_environment($port), POOLED => 1);
	my $tested = 0;

	my ($python) = programs('python3');
	foreach my $client (['psycopg2', 'psycopg2', readonly => 1], [ 'psycopg', 'psycopg3', binary => 10, readonly => 1 ], [ 'asyncpg', 'asyncpg', pool => 100, readonly => 1 ])
	{
		my ($module, $name, @more) = @$client;

		next unless $python && can_run("python3-$module", $python, '-c', "import $module");
		counted($name, run_client(\%pooled, $python, program("python/with_$name.py")), @more);
		$tested++;
	}
	my ($nodejs) = programs('node');
	if ($nodejs && can_run("npm's package postgres", $nodejs, '-e', "require.resolve('postgres')"))
	{
		counted('postgres.js', run_client(\%pooled, $nodejs, program('node/with_postgres.js')));
		$tested++;
	}
	my ($java) = programs('java');
	my $driver = '/usr/share/java/postgresql.jar';
	if ($java && -e $driver && can_run('a JDK', $java, '--describe-module', 'jdk.compiler'))
	{
		$pooled{JDBC_URL} .= '&prepareThreshold=0';
		counted('jdbc', run_client(\%pooled, $java, '-cp', $driver, program('java/WithJdbc.java')), called => 4, readonly => 1);
		$tested++;
	}
	cmp_ok(sql(q{SELECT count(*) FROM pg_stat_activity WHERE usename = 'shop'}), '<=', 2, 'all came over two connections') if $tested;
	stop_poolers();
}

# --- Pgpool -----------------------------------------------------------------

# All that only reads goes to the standby, as far as Pgpool knows.
SKIP:
{
	skip 'pgpool2 is not installed', 1 unless $pgpool;

	$node->backup('backup');
	my $standby = PostgreSQL::Test::Cluster->new('standby');
	$standby->init_from_backup($node, 'backup', has_streaming => 1);
	$standby->append_conf('postgresql.conf', q{listen_addresses = ''});
	$standby->start;

	my $base = $node->basedir . '/pgpool';
	my $superuser = sql('SELECT current_user');

	sub start_pgpool
	{
		my ($name, $more) = @_;
		my $port = PostgreSQL::Test::Cluster::get_free_port();
		my $pcp = PostgreSQL::Test::Cluster::get_free_port();

		append_to_file("$base.$_", '') foreach 'pcp', 'hba';
		append_to_file("$base.$name.conf", qq{
listen_addresses = ''
port = $port
socket_dir = '@{[ $node->host ]}'
pcp_listen_addresses = ''
pcp_port = $pcp
pcp_socket_dir = '@{[ $node->host ]}'
wd_ipc_socket_dir = '@{[ $node->host ]}'
backend_clustering_mode = 'streaming_replication'
backend_hostname0 = '@{[ $node->host ]}'
backend_port0 = @{[ $node->port ]}
backend_weight0 = 0
backend_flag0 = 'DISALLOW_TO_FAILOVER'
backend_hostname1 = '@{[ $standby->host ]}'
backend_port1 = @{[ $standby->port ]}
backend_weight1 = 1
backend_flag1 = 'DISALLOW_TO_FAILOVER'
num_init_children = 2
load_balance_mode = on
enable_pool_hba = off
pool_passwd = ''
sr_check_user = '$superuser'
sr_check_database = 'postgres'
sr_check_period = 1
health_check_period = 0
pid_file_name = '$base.$name.pid'
logdir = '@{[ $node->basedir ]}'
$more
});
		start_pooler("pgpool.$name", $port, $pgpool, '-n', '-f', "$base.$name.conf", '-F', "$base.pcp", '-a', "$base.hba");
		return $port;
	}

	# What a statement returns to shop over a connection to it.
	sub pooled
	{
		my ($port, $statements) = @_;

		return $node->safe_psql('shop', $statements,
			connstr => sprintf('host=%s port=%d dbname=shop user=shop', $node->host, $port));
	}

	# What is counted is not stored now.
	sql(q{
		ALTER FOREIGN TABLE hits OPTIONS (SET interval '1h');
		ALTER FOREIGN TABLE article_counts OPTIONS (SET interval '1h');
		INSERT INTO articles VALUES (1000, 'pgpool', 5)});
	$node->wait_for_catchup($standby);

	my $port = start_pgpool('plain', '');
	is(pooled($port, q{SELECT current_setting('port')}), $standby->port, 'a SELECT goes to the standby');
	is(pooled($port, q{SELECT sb_increment('/pool', buffer => 'hits')}), 1, 'one that increments goes to the primary');
	pooled($port, q{INSERT INTO hits VALUES ('/pool')});
	is(pooled($port, q{SELECT sb_total('/pool', 'hits'), sb_count('/pool', 'hits')}), '2|2', 'so does one that calls our other functions');
	is(pooled($port, q{BEGIN; SELECT sb_increment('/pool', buffer => 'hits'); SELECT sb_total('/pool', 'hits'); ROLLBACK}), "1\n3",
		'in a transaction, too');
	pooled($port, q{UPDATE article SET views = views + 1 WHERE id = 1000});

	# The rest is not known to be more than reading.
	is(pooled($port, q{SELECT * FROM hits}), '', 'a SELECT from the buffer has nothing, on the standby');
	is(pooled($port, q{SELECT views FROM article WHERE id = 1000}), 5, 'one from the view has what is stored there');
	stop_poolers();

	$port = start_pgpool('routed', q{primary_routing_query_pattern_list = '.*(hits|article).*'});
	is(pooled($port, q{SELECT current_setting('port')}), $standby->port, 'a SELECT goes to the standby');
	is(pooled($port, q{SELECT * FROM hits}), '/pool|2', 'but one from the buffer to the primary, if Pgpool is told so');
	is(pooled($port, q{SELECT views FROM article WHERE id = 1000}), 6, 'and one from the view');
	stop_poolers();

	is(sql(q{SELECT sb_drain('hits'), sb_drain('article_counts')}), 't|t', 'drained');
	is(sql(q{SELECT views FROM page_views WHERE path = '/pool'}), '2', 'the sum is exact');
	is(sql(q{SELECT views FROM articles WHERE id = 1000}), '6', 'and that of an article');
	$node->wait_for_catchup($standby);
	is($standby->safe_psql('shop', q{SELECT views FROM page_views WHERE path = '/pool'}), '2', 'the standby has what is stored');
	$standby->stop;
}

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
